"""Faults that a person could make, each with the tests that must notice it.

``python -m tests.mutations`` applies them one by one to a copy of the tree, runs the named tests
there and says which test caught the fault. A fault that no test notices is a missing test.

    python -m tests.mutations --list
    python -m tests.mutations --only packing,kernels
    python -m tests.mutations --match "residual"

One file for each room of the library, all with a tuple ``MUTATIONS``. The old text of a mutation
must stand exactly once in its file: where the library has changed, the mutation has to follow, and
``tests/project/test_mutations.py`` says so.
"""
