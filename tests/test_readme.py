"""README.md says what the code and the checks say."""

from readme import ROOT, replace, settings_table, tree

README = (ROOT / "README.md").read_text()


def test_the_settings_table_is_the_notebooks():
    assert replace(README, "settings", settings_table()) == README, "run: make readme"


def test_the_tree_has_every_room_and_its_own_words():
    assert replace(README, "tree", tree()) == README, "run: make readme"


def test_its_two_commands_are_the_ones_ci_runs():
    ci = (ROOT / ".ci" / "run").read_text()
    make = (ROOT / "Makefile").read_text()
    assert "\nmake test" in ci and "\nmake test " in README
    assert "\nmake run " in README and "\nrun: " in make and "make run" in ci


def test_it_runs_within_one_screen():
    assert README.index("make run") < 1400 and README.index("Open in Colab") < 200
