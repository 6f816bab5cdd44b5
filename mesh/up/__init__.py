"""`mesh up`: a whole mesh on one machine, as child processes of one supervisor.

``plan`` decides (pure), ``supervisor`` carries out, ``child`` owns one process and its log,
``layout`` owns the data directory and the ports, ``etcd_server`` knows etcd's command line.
"""
