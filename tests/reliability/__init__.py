"""Long runs that hurt: restarts, kills and ZooKeeper's faults under a steady load, with what must hold checked.

    python tests/reliability RUN [--seed N] [--count N] [--minutes M]

RUN is one of rolling, kill, faults, outage, herd, cycles, hunt, retries, workers, balance, proxy, soak, hostile,
overload; `trust` is all that calls are trusted for (`trust.py`). It prints its progress, then a table, and exits with 1
if anything that must hold did not. Providers (`member.py`, `laggard.py`) and consumers (`caller.py`) are processes of
their own, which `fleet.py` drives by lines of JSON; their clocks are one, the machine's monotonic one. The runs hold no
thresholds of their own: what must hold is said where it is checked.
"""
