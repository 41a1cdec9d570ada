"""`distill experiment`: backdoors planted, removed blind with every method, and the results attacked.

    suites     which cells there are, as data
    organisms  planting: organisms by family, their shared twins, the plant gate
    methods    every way of removing, ours among them, at equal rows and tokens; frozen knobs
    grid       cells by content: made once, by any number of processes
    summary    statistics and the tables
    run        the verb
"""
