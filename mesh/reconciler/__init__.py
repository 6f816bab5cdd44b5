"""Keeps a cluster's KServe resources and the mesh's registry in step: `mesh controller`.

``plan*``, ``selection``, ``status`` and ``workload`` decide and are pure; ``kube`` alone talks to
the API server and ``meshes`` alone to the registry; ``controller`` feeds the ones and carries out
what they return.
"""
