"""All cells of the matrix on eight devices: `python -m tests.parallel.eight_devices`.

Prints how many rows are exact and how many are refused; fails where a row is neither, and where a
ring of eight devices doesn't need about half of the memory of one of four.
"""

import sys

import jax

from tests import settings

settings.settle()
jax.config.update("jax_num_cpu_devices", 8)


def main():
    from tests.parallel import cells, ring_test

    settings.collect_less_garbage()
    exact, refused, wrong = 0, 0, []
    for cell in cells.CELLS:
        try:
            found = len(cells.refused(cell, 8))
        except AssertionError as error:
            wrong.append(str(error))
        else:
            exact, refused = exact + len(cell.rows) - found, refused + found
    memory = [ring_test.compiled(n).memory_analysis().temp_size_in_bytes for n in (4, 8)]
    if memory[1] > 0.6 * memory[0]:  # of each device; a tile of scores is the same for both
        wrong.append(f"memory of a ring of 4 and of 8 devices: {memory}")
    print(exact, refused)
    sys.exit("\n".join(wrong) or 0)


if __name__ == "__main__":
    main()
