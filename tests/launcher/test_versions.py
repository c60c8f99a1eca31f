import pytest

from zimage_turbo.launcher import versions


@pytest.mark.parametrize(
    ("version", "specifiers", "met"),
    [
        ("0.30.0", ">=0.30.0", True),
        ("0.30", ">=0.30.0", True),
        ("0.29.9", ">=0.30.0", False),
        ("0.100.0", ">=0.30.0", True),
        ("0.31.0rc1", ">=0.31.0", False),
        ("0.31.0rc1", ">=0.30.0", True),
        ("2.13.0+cpu", "==2.13.0", True),
        ("1.4.2", ">=1.0,<1.4", False),
        ("1.4.2", "~=1.3", True),
        ("2.0", "~=1.3", False),
        ("1.4.2", "==1.4.*", True),
        ("1.5", "!=1.4.*", True),
        ("9.9", "", True),
    ],
)
def test_condition_on_a_version(version, specifiers, met):
    assert versions.satisfies(version, specifiers) is met


def test_unreadable_versions_are_refused():
    with pytest.raises(ValueError, match="'unknown' is not a version number"):
        versions.parse_version("unknown")
    with pytest.raises(ValueError, match="is not a version condition"):
        versions.satisfies("1.0", "newer than 2")


@pytest.mark.parametrize(
    ("line", "parsed"),
    [
        ("torch", ("torch", "")),
        ("comfy-kitchen==0.2.26", ("comfy-kitchen", "==0.2.26")),
        ("  SQLAlchemy>=2.0.0,<3  # database", ("SQLAlchemy", ">=2.0.0,<3")),
        ("uvicorn[standard]>=0.1", ("uvicorn", ">=0.1")),
        ("", None),
        ("#non essential dependencies:", None),
        ("-r other.txt", None),
        ("pywin32>=300; sys_platform == 'win32'", None),
    ],
)
def test_requirement_lines(line, parsed):
    assert versions.parse_requirement(line) == parsed


def test_installed_problem_names_package_and_versions():
    assert versions.installed_problem("pytest>=1.0") is None
    assert versions.installed_problem("no-such-package-of-ours") == "no-such-package-of-ours is not installed"
    problem = versions.installed_problem("pytest>=99999")
    assert problem.startswith("pytest ") and problem.endswith("is installed, >=99999 is needed")
