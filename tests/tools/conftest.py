"""The tiny models and folders of the two packages' tests."""

from tests.mindmerger.conftest import build, examples, models, quiet, work  # noqa: F401
from tests.regmean.conftest import save, texts  # noqa: F401
