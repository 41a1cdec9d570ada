"""`distill gate`: a pass or a fail for CI: enough of the run is understood, little of it is error, and shuffled hypotheses say nothing.

Intervals are read against the run: the lower end of what is understood, the upper end of the error's share.
"""

from __future__ import annotations

import json

from distill.config_hypotheses import Gate
from distill.understand import named_file
from graphs.artifact import read_json
from graphs.hypotheses.understanding import NULL


def run(verb: Gate) -> int:
    """Read what `distill understand` measured; 1 where a bound is missed."""
    file = verb.run / named_file("circuit")
    if not file.is_file():
        raise ValueError(f"--run {verb.run}: nothing was measured there yet; run distill understand {verb.run} first")
    found = read_json(file)
    if found["key"] != read_json(verb.run / "circuit" / "receipt.json")["key"]:
        raise ValueError(f"--run {verb.run}: its circuit has changed since it was measured; run distill understand {verb.run} again")
    whole = found["all"]
    bounds = [("understood", whole["understood"]["low"], ">=", verb.min_understood),
              ("error", whole["shares"]["error"]["high"], "<=", verb.max_error),
              ("shuffled", whole["null"]["value"], "<=", NULL)]
    said = [{"name": name, "value": value, "bound": bound, "passed": value >= bound if sign == ">=" else value <= bound}
            for name, value, sign, bound in bounds]
    if verb.json:
        print(json.dumps(said, indent=1))
    else:
        print("\n".join(f"{'pass' if one['passed'] else 'FAIL'}  {one['name']} {one['value']:.3f} {sign} {one['bound']:g}"
                        for one, (*_, sign, _) in zip(said, bounds, strict=True)))
    return 0 if all(one["passed"] for one in said) else 1
