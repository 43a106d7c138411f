"""The documents of pre-training by index: the generated corpus and the user's texts, as token samples."""

import random
from pathlib import Path

from thinkstack.data import DocumentSource, Example, text_source
from thinkstack.stages.pretrain_config import PretrainConfig
from thinkstack.tasks.puzzles.corpus import Document, document
from thinkstack.tasks.puzzles.puzzle import PuzzleTask, digest
from thinkstack.text.boundary import BoundarySplitter
from thinkstack.text.chat import ChatFormat
from thinkstack.text.fim import check_fim, fill_in_middle
from thinkstack.text.tokenizer import BOS
from thinkstack.types import Message


def make_source(cfg: PretrainConfig, suite: list[PuzzleTask], chat: ChatFormat) -> DocumentSource:
    """Documents by index: the generated corpus, with the user's texts mixed in.

    Raises ConfigError for text files that cannot be read, and for a tokenizer that lacks what a setting needs.
    """
    bos = chat.tokenizer.control_id(BOS)
    rework = Rework(cfg, chat)
    room = 8 + cfg.row_tokens // 16 if cfg.fim_rate or cfg.boundary_split_share else 0  # for control tokens and splits
    paths = [Path(path) for path in cfg.text_files]
    own = text_source(paths, chat.tokenizer.encode, bos, max(cfg.row_tokens - room, 1))

    def source(index: int) -> Example:
        draw = digest("text", cfg.seed, index)
        if own and draw % 10_000 < cfg.text_share * 10_000:
            return rework(own[draw // 10_000 % len(own)], index, is_text=True)
        doc = document(suite, cfg.corpus, cfg.seed, index)
        return rework(example_of(doc, chat, bos), index, is_text=not doc.question)

    return source


def example_of(doc: Document, chat: ChatFormat, bos: int) -> Example:
    """A document as tokens; all but BOS are learnt, the question too, as in any pre-training corpus."""
    prompt = chat.prompt([Message(role="user", content=doc.question)]) if doc.question else [bos]
    return example_with_loss([*prompt, *chat.answer(doc.text)])


def example_with_loss(ids: list[int]) -> Example:
    """A sample of which all but the first token are learnt."""
    return Example(tuple(ids), (0,) + (1,) * (len(ids) - 1))


class Rework:
    """What V3 does to documents before they are packed: holes in plain text, split boundary tokens.

    Both are drawn by (seed, index). A document that would then no longer fit a row stays as it was, and so does a piece
    of a text file that begins or ends within a character.
    """

    def __init__(self, cfg: PretrainConfig, chat: ChatFormat):
        self.cfg, self.tokenizer = cfg, chat.tokenizer
        self.end_ids = chat.stop_token_ids
        if cfg.fim_rate:
            check_fim(chat.tokenizer)
        self.splitter = BoundarySplitter(chat.tokenizer) if cfg.boundary_split_share else None

    def __call__(self, sample: Example, index: int, is_text: bool) -> Example:
        """The sample as it is trained on. is_text: plain text or code, no question with its answer."""
        cfg = self.cfg
        if is_text and cfg.fim_rate:
            rng = random.Random(digest("fim", cfg.seed, index))
            if rng.random() < cfg.fim_rate:
                sample = self._fitting(self._with_hole(sample, rng), sample)
        if self.splitter is not None:
            rng = random.Random(digest("boundary", cfg.seed, index))
            sample = self._fitting(self.splitter.split(sample.ids, cfg.boundary_split_share, rng), sample)
        return sample

    def _with_hole(self, sample: Example, rng: random.Random) -> list[int]:
        body = sample.ids[1:-1] if sample.ids[-1] in self.end_ids else sample.ids[1:]
        text = self.tokenizer.decode(body)
        if not text or "\ufffd" in text:
            return list(sample.ids)
        return [sample.ids[0], *fill_in_middle(text, self.tokenizer, rng)]

    def _fitting(self, ids: list[int], before: Example) -> Example:
        return before if len(ids) - 1 > self.cfg.row_tokens else example_with_loss(ids)
