"""The mesh in virtual time: production objects, made workloads, scripted faults."""
