"""What a run saw, as the table of docs/faults.md: python -m tests.faults.table FILE."""

import json
import sys
from pathlib import Path

from tests.faults.failpoints import MOMENTS

HEAD = ("killed", "at", "the client got", "tokens sent", "tokens billed", "the ledger", "closed after, s")


def main() -> None:
    rows = [HEAD, ("---",) * len(HEAD)]
    every = json.loads(Path(sys.argv[1]).read_text())
    faults = [seen["fault"] for seen in every]
    for seen in sorted(every, key=lambda one: (faults.index(one["fault"]), _order(one["moment"]))):
        counted = seen["counted"]
        tokens = (seen["sent_tokens"], seen["billed_tokens"]) if counted else ("", "")
        rows.append(
            (seen["fault"], seen["moment"], seen["client"], *tokens, seen["ledger"], seen["closed_s"])
        )
    sys.stdout.writelines(f"| {' | '.join(str(cell) for cell in row)} |\n" for row in rows)


def _order(moment: str) -> int:
    return MOMENTS.index(moment) if moment in MOMENTS else 0


if __name__ == "__main__":
    main()
