import os

ALL = bool(os.environ.get("SD_TEST_ALL"))  # all cases of the tests that take a part of them, which takes long
