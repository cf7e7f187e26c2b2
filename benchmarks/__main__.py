"""`python -m benchmarks`: runner.py says what it prints."""

from esol.base.machine import wait_briefly

if __name__ == "__main__":
    wait_briefly()  # as esol's commands have it; before torch is loaded
    from benchmarks.runner import main

    main()
