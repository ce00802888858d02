import pytest

from attnjax.tasks import digits_builder


@pytest.fixture
def during_preparation(monkeypatch):
    """Lets a test do something in the middle of the next preparation."""

    def install(action):
        prepare = digits_builder.Digits.download_and_prepare

        def patched(builder):
            monkeypatch.undo()
            prepare(builder)
            action()

        monkeypatch.setattr(digits_builder.Digits, "download_and_prepare", patched)

    return install


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_of_two_writers_at_once_one_wins(during_preparation, tmp_path):
    first = {}
    during_preparation(lambda: first.update(contents(digits_builder.prepare(tmp_path, seed=0))))
    target = digits_builder.prepare(tmp_path, seed=0)
    assert len(first) == 4 and contents(target) == first
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


def test_a_preparation_that_fails_leaves_nothing(during_preparation, tmp_path):
    def fail():
        raise KeyboardInterrupt

    during_preparation(fail)
    with pytest.raises(KeyboardInterrupt):
        digits_builder.prepare(tmp_path, seed=0)
    assert not (tmp_path / "digits" / "seed0" / "1.0.0").exists()
    assert digits_builder.prepare(tmp_path, seed=0).exists()


def test_prepared_once(tmp_path, monkeypatch):
    target = digits_builder.prepare(tmp_path, seed=5)
    monkeypatch.setattr(digits_builder.Digits, "download_and_prepare", None)
    assert digits_builder.prepare(tmp_path, seed=5) == target
    assert target.relative_to(tmp_path).as_posix() == "digits/seed5/1.0.0"


def test_stdout_stays_clean(tmp_path, capsys):
    digits_builder.prepare(tmp_path, seed=0)
    assert capsys.readouterr().out == ""


def test_a_failed_move_is_not_hidden(tmp_path, monkeypatch):
    def no_space(*paths):
        raise OSError("no space")

    monkeypatch.setattr(digits_builder.os, "rename", no_space)
    with pytest.raises(OSError, match="no space"):
        digits_builder.prepare(tmp_path, seed=0)
