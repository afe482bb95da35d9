"""The command line with the tests' stages registered: ``python -m tests.support.launch submit PIPELINE``."""

from orchestrator.cli import main
from tests.chaos.stages import register
from tests.support import toy_stages

if __name__ == "__main__":
    toy_stages.register()
    register()
    main()
