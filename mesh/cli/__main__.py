"""``python -m mesh.cli`` is the `mesh` command."""

from mesh.cli.main import app

app(prog_name="mesh")
