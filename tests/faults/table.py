"""What a run saw, as the table of docs/faults.md: python -m tests.faults.table FILE."""

import json
import sys
from pathlib import Path

HEAD = ("killed", "at", "the client got", "tokens sent", "tokens billed", "the ledger", "closed after, s")


def main() -> None:
    rows = [HEAD, ("---",) * len(HEAD)]
    for seen in json.loads(Path(sys.argv[1]).read_text()):
        counted = seen["counted"]
        tokens = (seen["sent_tokens"], seen["billed_tokens"]) if counted else ("", "")
        rows.append(
            (seen["fault"], seen["moment"], seen["client"], *tokens, seen["ledger"], seen["closed_s"])
        )
    sys.stdout.writelines(f"| {' | '.join(str(cell) for cell in row)} |\n" for row in rows)


if __name__ == "__main__":
    main()
