"""How fast, how light: `python -m benchmarks`, from the project's root, as root.

```
 __main__ ─► measures/NAME.py ─► report     one module for each benchmark; its docstring is its protocol
                 │
                 ├─ lab        a directory, services and lxcpaths of the benchmarks' own, and the end of it all
                 ├─ programs   other programs, run in the cheapest way there is, and timed
                 ├─ processes  CPU time and memory of processes, and of the kernel
                 └─ stats      medians, 99th percentiles, ratios with their uncertainty
```

Every target is a ratio within one run, or a share of one CPU or of memory, so that it holds on any machine. What is
compared is measured in turns, so that whatever else the machine does hits both sides.
"""
