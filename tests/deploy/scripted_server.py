"""A server process with a scripted engine, over a database that several share.

    python -m tests.deploy.scripted_server --database URL [--port 0] [--tokens 40] [--step-seconds 0.01]

Answers have a fixed number of tokens. It prints its address like `thinkstack serve`.
"""

import argparse
import signal
import time

from tests.server.billing import PRICES
from tests.server.live import TOKENIZER, scripted
from thinkstack.engine.service import EngineService
from thinkstack.server.accounts import Accounts
from thinkstack.server.app import Server
from thinkstack.server.database import Database
from thinkstack.server.run import ApiProcess, listen
from thinkstack.server.served import Member, MemberConfig, ServedModels, config_of_model
from thinkstack.server.settings import ServerSettings
from thinkstack.text.chat import chat_format
from thinkstack.text.grammar import GrammarCompiler


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--database", required=True)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--step-seconds", type=float, default=0.0)
    parser.add_argument("--stream-interval", type=float, default=0.02)
    parser.add_argument("--drain-seconds", type=float, default=30.0)
    given = parser.parse_args()
    text = TOKENIZER.decode(TOKENIZER.encode(" the" * given.tokens)[: given.tokens])

    def answer(prompt: str, index: int) -> str:
        return text if prompt.endswith("</think>") else f" is 3</think>{text}"

    with listen("127.0.0.1", given.port) as listener:
        chat = chat_format("v3_1_think", TOKENIZER)
        engine = scripted(chat, answer, max_num_seqs=64, max_waiting=1024)
        step = engine.step

        def paced_step():
            time.sleep(given.step_seconds)
            return step()

        if given.step_seconds:
            engine.step = paced_step
        member = Member(MemberConfig(model="scripted"), EngineService(engine), chat, GrammarCompiler(chat))
        settings = ServerSettings(drain_seconds=given.drain_seconds, stream_interval=given.stream_interval)
        models = ServedModels({"default": member}, config_of_model("scripted").models)
        server = Server(models, Accounts(Database(given.database), PRICES), settings)
        signal.signal(signal.SIGTERM, lambda number, frame: None)  # uvicorn raises it again at its end
        ApiProcess(server).run(sockets=[listener])


if __name__ == "__main__":
    main()
