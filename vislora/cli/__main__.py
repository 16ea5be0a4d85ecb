"""python -m vislora.cli"""

from . import main

main()
