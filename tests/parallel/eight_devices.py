"""Cells of the matrix on eight devices: `python -m tests.parallel.eight_devices 0 2` runs half.

Prints how many are exact and how many are refused; fails with those that are neither.
"""

import sys

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_disable_most_optimizations", True)


def main(part, parts):
    from attnjax.parallel import matrix
    from tests.parallel import helpers, matrix_test

    exact, refused, wrong = 0, 0, []
    for cell in helpers.share(part, parts):
        number, strategy, row = cell
        refusal = matrix.tables()[number].refusal(strategy, row, 8)
        if refusal:
            matrix_test.assert_names_what_works(number, row, refusal, devices=8)
            refused += 1
        elif (error := helpers.largest_error(cell, 8)) <= matrix_test.TOLERANCE:
            exact += 1
        else:
            wrong.append((strategy, row, error))
    print(exact, refused)
    sys.exit(str(wrong) if wrong else 0)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
