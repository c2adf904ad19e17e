"""Calls on a virtual clock, a virtual network and a virtual ZooKeeper: a seed decides what goes wrong, and when.

    python tests/simulation --seed 7            one seed, again and alike
    python tests/simulation --count 20000       many; goes on from where it was stopped

What is simulated is what runs: the C sessions of both sides and the decisions of discovery, of balancing and of
retrying, all of which take the time and the bytes as arguments. What they are driven by is simulated: `network.py` has
the time and the connections, `actors.py` the processes, `run.py` the faults and what must hold.
"""
