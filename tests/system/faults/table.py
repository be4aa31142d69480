"""Prints a run's observations as the table of docs/faults.md: python -m tests.system.faults.table FILE."""

import json
import sys
from pathlib import Path

from tests.system.faults.fail_points import MOMENTS

HEAD = ("killed", "at", "the client got", "tokens sent", "tokens billed", "the ledger", "closed after, s")


def main() -> None:
    rows = [HEAD, ("---",) * len(HEAD)]
    observations = json.loads(Path(sys.argv[1]).read_text())
    faults = [observation["fault"] for observation in observations]
    for seen in sorted(observations, key=lambda row: (faults.index(row["fault"]), _order(row["moment"]))):
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
