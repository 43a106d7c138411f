"""Prices per token from a TOML file, in exact integers.

All amounts of money are integers of 1e-12 of a currency unit ("pico"). A price per million tokens with up to six
decimals is a whole number of them per token: 0.07 USD per 1M tokens is 70,000 pico-USD per token. No amount is ever
rounded; a price that would need rounding is refused.
"""

import datetime
from collections.abc import Iterable
from dataclasses import dataclass, fields
from decimal import Decimal, localcontext
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from annotated_types import Ge, Le

from thinkstack.config import build, did_you_mean
from thinkstack.types import ConfigError

PICO = 10**12
"""Pico units in one unit of the currency."""
PRICE_TO_PICO = PICO // 10**6
"""Pico units per token in a price of 1 per million tokens."""
MAX_PICO = 2**62
"""Largest amount: 4.6 million units of the currency; sums of two fit 64 bits."""
Day = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
DAYS: tuple[Day, ...] = get_args(Day)
NonNegative = Annotated[Decimal, Ge(0), Le(100_000)]


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Tokens of one request, with the API's names: prompt tokens are hits plus misses of the prefix cache."""

    prompt_cache_hit_tokens: int = 0
    prompt_cache_miss_tokens: int = 0
    completion_tokens: int = 0
    """Includes the reasoning tokens."""
    reasoning_tokens: int = 0

    def __post_init__(self) -> None:
        assert min(vars(self).values()) >= 0 and self.reasoning_tokens <= self.completion_tokens, self

    @staticmethod
    def sum(usages: "Iterable[Usage]") -> "Usage":
        """The usage of several requests together."""
        rows = [vars(usage) for usage in usages]
        return Usage(**{field.name: sum(row[field.name] for row in rows) for field in fields(Usage)})


@dataclass(frozen=True, kw_only=True)
class Price:
    """What one token costs, in pico units."""

    id: str
    """Model, start of validity and hours, as the ledger shows them."""
    hit_pico: int
    miss_pico: int
    output_pico: int

    def cost_pico(self, usage: Usage) -> int:
        """The cost of what was delivered, in pico units."""
        prompt = usage.prompt_cache_hit_tokens * self.hit_pico + usage.prompt_cache_miss_tokens * self.miss_pico
        return prompt + usage.completion_tokens * self.output_pico

    def max_cost_pico(self, prompt_tokens: int, completion_tokens: int) -> int:
        """The largest cost of a request: all prompt tokens at the dearer of the two prices for them."""
        return prompt_tokens * max(self.hit_pico, self.miss_pico) + completion_tokens * self.output_pico


FREE = Price(id="free", hit_pico=0, miss_pico=0, output_pico=0)
"""The price of every model on a server without prices."""


@dataclass(frozen=True, kw_only=True)
class HoursConfig:
    """Daily hours with another price, off-peak or peak: `factor`, or prices of their own."""

    start: datetime.time
    """First moment, UTC."""
    end: datetime.time
    """First moment after the hours, UTC; before `start`: on the next day; equal to it: 24 hours later."""
    weekdays: tuple[Day, ...] = DAYS
    """Days (UTC) on which the hours start."""
    factor: NonNegative | None = None
    """Factor of the three prices."""
    input_hit: NonNegative | None = None
    input_miss: NonNegative | None = None
    output: NonNegative | None = None

    def __post_init__(self) -> None:
        own = (self.input_hit, self.input_miss, self.output)
        given = sum(price is not None for price in own)
        if (given, self.factor is None) not in ((0, False), (3, True)):
            raise ConfigError(f"the hours from {self.start} need either factor or all of input_hit, input_miss, output")
        if self.start.tzinfo or self.end.tzinfo:
            raise ConfigError(
                f"the hours from {self.start} name a time zone; hours are UTC, written as {self.start:%H:%M:%S}"
            )

    def contains(self, moment: datetime.datetime) -> bool:
        """Whether a moment (UTC) is in these hours."""
        time, today = moment.time(), moment.weekday()
        if self.start < self.end:
            return self.start <= time < self.end and DAYS[today] in self.weekdays
        return DAYS[today if time >= self.start else today - 1] in self.weekdays and not self.end <= time < self.start


@dataclass(frozen=True, kw_only=True)
class PriceConfig:
    """Prices of one model from a moment on, per million tokens."""

    input_hit: NonNegative
    """Prompt tokens found in the prefix cache."""
    input_miss: NonNegative
    """Prompt tokens that were computed."""
    output: NonNegative
    """Completion tokens, with the reasoning."""
    valid_from: datetime.datetime = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
    """Start of validity with its time zone; default 1970."""
    off_peak: tuple[HoursConfig, ...] = ()
    """Hours with other prices; the first that contain the moment count."""

    def __post_init__(self) -> None:
        if self.valid_from.tzinfo is None:
            raise ConfigError(f"valid_from={self.valid_from} has no time zone; write {self.valid_from.isoformat()}Z")


class PriceTable:
    """The prices of all models; a price is chosen when a request is admitted."""

    def __init__(self, tree: dict[str, Any], where: str = "prices"):
        """tree: `currency` and `models`, a table of rows for each model. Raises ConfigError; where: for messages."""
        for key in tree:
            if key not in ("currency", "models"):
                raise ConfigError(f"{where}: unknown key {key}{did_you_mean(key, ('currency', 'models'))}")
        currency = tree.get("currency")
        if not isinstance(currency, str) or not currency:
            raise ConfigError(f'{where}: currency={currency!r}; give a code such as currency = "USD"')
        self.currency: str = currency
        models = tree.get("models")
        if not isinstance(models, dict) or not models:
            raise ConfigError(f"{where} has no models; add a row [[models.NAME]]")
        self.models: dict[str, list[PriceConfig]] = {}
        for name, rows in models.items():
            if not isinstance(rows, list):
                raise ConfigError(f"{where}: models.{name} is not a list of rows; write [[models.{name}]]")
            configs = [build(PriceConfig, row, f"models.{name}[{index}]") for index, row in enumerate(rows)]
            self.models[name] = sorted(configs, key=lambda config: config.valid_from)
            for config in configs:  # refuse a price that would need rounding when it is read, not when it is used
                _price(name, config, None)
                _ = [_price(name, config, hours) for hours in config.off_peak]

    @classmethod
    def read(cls, path: Path) -> "PriceTable":
        """The table in a TOML file. Raises ConfigError."""
        import tomllib

        from thinkstack.files import read_text

        try:
            tree = tomllib.loads(read_text(path, "prices"), parse_float=Decimal)
        except (ValueError, ArithmeticError, RecursionError) as error:
            raise ConfigError(f"{path} is not TOML: {error}") from error
        return cls(tree, str(path))

    def price(self, model: str, moment: datetime.datetime) -> Price:
        """The price of a model at a moment (with its time zone). Raises ConfigError for a model without one."""
        moment = moment.astimezone(datetime.UTC)
        if model not in self.models:
            raise ConfigError(f"no price for the model {model!r}{did_you_mean(model, self.models)}")
        config = next((row for row in reversed(self.models[model]) if row.valid_from <= moment), None)
        if config is None:
            first = self.models[model][0].valid_from
            raise ConfigError(
                f"the prices of {model!r} begin at {first:%Y-%m-%d %H:%M %Z}; add a row that is valid now"
            )
        return _price(model, config, next((hours for hours in config.off_peak if hours.contains(moment)), None))


def _price(model: str, config: PriceConfig, hours: HoursConfig | None) -> Price:
    prices = [config.input_hit, config.input_miss, config.output]
    name = f"{model}@{config.valid_from.astimezone(datetime.UTC):%Y-%m-%dT%H:%MZ}"
    with localcontext(prec=100):
        if hours is not None:
            name += f" {hours.start:%H:%M}-{hours.end:%H:%M}"
            own = (hours.input_hit, hours.input_miss, hours.output)
            factor = hours.factor if hours.factor is not None else Decimal(1)
            prices = [new if new is not None else price * factor for new, price in zip(own, prices, strict=True)]
        hit, miss, output = (_to_integer(price * PRICE_TO_PICO, f"{name}: {price} per 1M tokens") for price in prices)
    return Price(id=name, hit_pico=hit, miss_pico=miss, output_pico=output)


def parse_amount(text: str) -> int:
    """An amount of money such as "5.00", in pico units. Raises ConfigError."""
    try:
        with localcontext(prec=100):
            amount = _to_integer(Decimal(text) * PICO, f"the amount {text}")
    except ArithmeticError as error:
        raise ConfigError(f"the amount {text!r} is not a number; write it as 5.00") from error
    if not 0 <= amount <= MAX_PICO:
        raise ConfigError(f"the amount {text} is not between 0 and {MAX_PICO // PICO:,}")
    return amount


def format_amount(pico: int) -> str:
    """An amount in units of the currency, exact, with at least two decimals: 4999999930000 is "4.99999993"."""
    units, rest = divmod(abs(pico), PICO)
    decimals = f"{rest:012d}".rstrip("0").ljust(2, "0")
    return f"{'-' if pico < 0 else ''}{units}.{decimals}"


def _to_integer(value: Decimal, what: str) -> int:
    if not value.is_finite() or value != value.to_integral_value():
        raise ConfigError(f"{what} is not a whole number of 1e-12 per token; give at most six decimals per 1M tokens")
    return int(value)
