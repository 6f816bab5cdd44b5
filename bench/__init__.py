"""Measurements of the mesh against baselines of the same run; ``python -m bench --help``.

Every part can be run alone, prints a table and writes a small JSON file with the machine and the
commit. Only ratios within one run mean something: runs alternate (A B A B ...), a figure is the
median over the pairs, and its spread is printed beside it. Nothing in here is imported by the
product.
"""
