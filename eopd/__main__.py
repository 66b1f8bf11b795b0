"""``python -m eopd`` is the ``eopd`` command."""

from eopd.cli.main import main

main()
