"""The command line with the chaos stages registered: ``python -m tests.chaos.launch submit PIPELINE``."""

from orchestrator.cli import main
from tests.chaos.stages import register

if __name__ == "__main__":
    register()
    main()
