"""python -m torture"""

from torture.run import main

main()
