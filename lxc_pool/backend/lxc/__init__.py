"""Containers by liblxc: its configuration (`container_config`), the life of one (`engine`), its removal (`removal`).

The only package that imports the `lxc` binding, and only worker processes import this package: the binding holds the
GIL in nearly every call.
"""
