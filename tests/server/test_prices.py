"""Prices are exact: every sum here was worked out by hand."""

import datetime
import re

import pytest

from tests.server.billing import usage
from thinkstack.server.prices import PriceTable, format_amount, parse_amount
from thinkstack.types import ConfigError

DEEPSEEK = """
currency = "USD"

[[models.deepseek-chat]]
valid_from = 2024-12-26T00:00:00Z
input_hit = 0.014
input_miss = 0.14
output = 0.28

[[models.deepseek-chat]]
valid_from = 2025-02-08T16:00:00Z
input_hit = 0.07
input_miss = 0.27
output = 1.10
off_peak = [{start = 16:30:00, end = 00:30:00, factor = 0.5}]

[[models.deepseek-reasoner]]
input_hit = 0.14
input_miss = 0.55
output = 2.19
off_peak = [{start = 16:30:00, end = 00:30:00, input_hit = 0.035, input_miss = 0.135, output = 0.55}]

[[models.deepseek-flash]]
input_hit = 0.003
input_miss = 0.15
output = 0.60
off_peak = [
    {start = 01:00:00, end = 04:00:00, weekdays = ["mon", "tue", "wed", "thu", "fri"], factor = 2},
    {start = 22:00:00, end = 02:00:00, weekdays = ["sun"], factor = 0.5},
]
"""


@pytest.fixture
def table(tmp_path):
    return read(tmp_path, DEEPSEEK)


def read(folder, text):
    path = folder / "prices.toml"
    path.write_text(text, encoding="utf-8")
    return PriceTable.read(path)


def at(text):
    return datetime.datetime.fromisoformat(text).replace(tzinfo=datetime.UTC)


def parts(price):
    return price.hit_pico, price.miss_pico, price.output_pico


def test_a_price_per_million_is_a_whole_number_of_pico_units_per_token(table):
    assert parts(table.price("deepseek-chat", at("2025-03-01T12:00"))) == (70_000, 270_000, 1_100_000)
    assert parts(table.price("deepseek-reasoner", at("2025-03-01T12:00"))) == (140_000, 550_000, 2_190_000)


def test_v3_costs_what_the_price_list_says(table):
    """1,000 cached + 2,000 computed + 500 completion tokens: 0.00007 + 0.00054 + 0.00055 = 0.00116 USD."""
    cost = table.price("deepseek-chat", at("2025-03-01T12:00")).cost_pico(usage(1000, 2000, 500))
    assert (cost, format_amount(cost)) == (1_160_000_000, "0.00116")


def test_r1_off_peak_costs_what_the_price_list_says(table):
    """1 + 1 + 3 tokens: 0.035 + 0.135 + 3 * 0.55 = 1.82 USD per 1M, that is 0.00000182 USD."""
    cost = table.price("deepseek-reasoner", at("2025-03-01T23:00")).cost_pico(usage(1, 1, 3, 2))
    assert (cost, format_amount(cost)) == (1_820_000, "0.00000182")


@pytest.mark.parametrize(
    ("time", "is_off_peak"),
    [("16:29:59.999", False), ("16:30", True), ("23:59:59.999", True), ("00:00", True), ("00:29:59", True),
     ("00:30", False)],
)  # fmt: skip
def test_off_peak_hours_cross_midnight(table, time, is_off_peak):
    expected = (35_000, 135_000, 550_000) if is_off_peak else (70_000, 270_000, 1_100_000)
    assert parts(table.price("deepseek-chat", at(f"2025-03-01T{time}"))) == expected


@pytest.mark.parametrize(
    ("moment", "hit"),
    [
        ("2026-11-30T01:00", 6_000),  # a Monday, peak hours; they win over those of Sunday night, written below
        ("2026-11-29T23:00", 1_500),  # Sunday
        ("2026-11-29T01:30", 3_000),  # Sunday before two: Saturday's night
        ("2026-11-28T01:30", 3_000),  # Saturday
        ("2026-12-01T23:00", 3_000),  # Tuesday
    ],
)
def test_hours_are_of_the_weekday_on_which_they_start(table, moment, hit):
    assert table.price("deepseek-flash", at(moment)).hit_pico == hit


def test_a_price_is_valid_from_its_moment(table):
    assert table.price("deepseek-chat", at("2025-02-08T15:59:59")).miss_pico == 140_000
    assert table.price("deepseek-chat", at("2025-02-08T16:00")).miss_pico == 270_000
    with pytest.raises(ConfigError, match="begin at 2024-12-26"):
        table.price("deepseek-chat", at("2024-12-25T00:00"))


def test_the_time_zone_of_a_moment_counts(table):
    beijing = datetime.datetime(2025, 3, 2, 0, 30, tzinfo=datetime.timezone(datetime.timedelta(hours=8)))
    assert table.price("deepseek-chat", beijing).hit_pico == 35_000  # 16:30 UTC


def test_the_largest_cost_takes_all_prompt_tokens_as_computed(table):
    price = table.price("deepseek-chat", at("2025-03-01T12:00"))
    assert price.max_cost_pico(10, 20) == 10 * 270_000 + 20 * 1_100_000
    assert all(price.cost_pico(usage(hit, 10 - hit, 20)) <= price.max_cost_pico(10, 20) for hit in range(11))


def test_the_id_of_a_price_names_its_row_and_hours(table):
    assert table.price("deepseek-chat", at("2025-03-01T17:00")).id == "deepseek-chat@2025-02-08T16:00Z 16:30-00:30"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("1.10", "1.1000001", "at most six decimals"),
        ("factor = 0.5}]\n", "factor = 0.33333333}]\n", "at most six decimals"),
        ("1.10", "-1", "output"),
        ("1.10", "nan", "output"),
        ("output = 1.10", "outptu = 1.10", "did you mean models.deepseek-chat[1].output?"),
        ("2025-02-08T16:00:00Z", "2025-02-08T16:00:00", "has no time zone"),
        ("factor = 0.5}]\n", "factor = 0.5, output = 1}]\n", "either factor or all of"),
        ('["sun"]', '["sunday"]', "weekdays"),
        ('currency = "USD"', "", "currency=None"),
        ('currency = "USD"', 'currncy = "USD"', "did you mean currency?"),
        ("[[models.deepseek-flash]]", "[models.flash]", "write [[models.flash]]"),
        ("[[models.deepseek-flash]]", "[[models.deepseek-flash]", "is not TOML"),
    ],
)
def test_a_price_list_that_cannot_be_used_is_refused(tmp_path, old, new, message):
    assert old in DEEPSEEK
    with pytest.raises(ConfigError, match=re.escape(message)):
        read(tmp_path, DEEPSEEK.replace(old, new))


def test_a_model_without_a_price_is_refused(table):
    with pytest.raises(ConfigError, match=r"did you mean 'deepseek-chat'|did you mean deepseek-chat"):
        table.price("deepseek-chta", at("2025-03-01T12:00"))


@pytest.mark.parametrize(
    ("text", "pico", "shown"),
    [
        ("5", 5 * 10**12, "5.00"),
        ("0.000000000001", 1, "0.000000000001"),
        ("4611686.018427387904", 2**62, "4611686.018427387904"),
    ],
)
def test_amounts_are_exact(text, pico, shown):
    assert (parse_amount(text), format_amount(pico)) == (pico, shown)


@pytest.mark.parametrize("text", ["", "five", "-1", "0.0000000000001", "1e30", "NaN", "Infinity", "1e999999999"])
def test_an_amount_that_cannot_be_kept_is_refused(text):
    with pytest.raises(ConfigError, match="the amount"):
        parse_amount(text)
