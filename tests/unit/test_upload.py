"""What a run writes goes elsewhere too, and comes back from there; ``file://`` is the elsewhere
of these tests.
"""

import json
import shutil
import sys
import time
from dataclasses import replace

import fakes
import pytest
from fsspec.registry import _registry

from eopd.config import ConfigError, load_config
from eopd.ledger import Ledger
from eopd.run import upload
from eopd.run.checkpoint import list_checkpoints
from eopd.run.directory import RunDirectory
from eopd.run.elsewhere import Place, require_upload
from eopd.run.lock import held
from eopd.run.place import require_no_foreign_files
from eopd.run.progress import Progress
from eopd.run.restore import restore
from eopd.run.upload import Uploads
from eopd.runtime.resume import config_to_continue

DIFFERENT = "choose another run.upload, or another run.name"


@pytest.fixture
def config(tmp_path):
    return configured(tmp_path)


@pytest.fixture
def there(tmp_path):
    return tmp_path / "elsewhere" / "r"


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr(upload, "FIRST_PAUSE_S", 0.05)
    monkeypatch.setattr(upload, "EVERY_S", 0.05)


def configured(root, *overrides):
    path = fakes.write_config(root, batches=20)
    return load_config(path, [f"run.upload=file://{root.parent / root.name}/elsewhere", *overrides])


def files_of(path):
    return {
        file.relative_to(path).as_posix(): file.read_bytes()
        for file in path.rglob("*")
        if file.is_file()
    }


def steps_at(path):
    return sorted(int(file.parent.name[5:]) for file in path.glob("checkpoints/*/manifest.json"))


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


async def train_to(directory, *steps, resumes=0, keep_last=2, uploads=None):
    """The files of a run that trained up to the last of ``steps``, with a checkpoint at each."""
    for step in steps:
        rows = [{"step": number, "issues": [number]} for number in range(1, step + 1)]
        directory.trained.write_text("".join(json.dumps(row) + "\n" for row in rows))
        progress = Progress(step=step, incarnation=resumes)
        await fakes.write_checkpoint(
            directory.checkpoints,
            progress.state(Ledger(), {}),
            fakes.save_weights,
            keep_last=keep_last,
            keep=uploads.needed if uploads else tuple,
        )
        directory.write_summary(progress.summary("running"))
        if uploads:
            uploads.wake()


async def uploaded(config, *steps, **options):
    """A run that was uploaded, and ended."""
    with held(config.run.path):
        directory = RunDirectory.create(config)
        with Uploads(config, print) as uploads:
            uploads.start()
            await train_to(directory, *steps, **options)

    return directory


async def test_everything_of_a_run_is_there_at_its_end(config, there):
    with held(config.run.path):
        directory = RunDirectory.create(config)
        said = []
        with Uploads(config, said.append) as uploads:
            uploads.start()
            await train_to(directory, 4, 8, 12, uploads=uploads)
            for name in ("hf/model", "hf-best/model", "adapter/weights", "logs/driver.log"):
                (directory.path / name).parent.mkdir(exist_ok=True)
                (directory.path / name).write_text(name)

            (directory.path / ".partial").write_text("x")
            directory.report.write_text("<html>")

        here = files_of(directory.path)

    found = files_of(there)
    left_out = {"logs/driver.log", ".partial", "run.lock"}
    assert found.pop("run.lock") == b""
    assert found == {name: text for name, text in here.items() if name not in left_out}
    assert steps_at(there) == [8, 12]
    assert said == []
    row = uploads.row()
    assert row["eopd_uploaded_step"] == 12.0
    assert row["eopd_upload_failures_total"] == 0.0
    assert row["eopd_upload_bytes_total"] >= sum(map(len, found.values())) - 3 * 400
    assert 0.0 < row["eopd_upload_seconds_total"] < 20.0


async def test_a_run_without_an_address_uploads_nothing(tmp_path):
    config = configured(tmp_path, "run.upload=null")
    directory = RunDirectory.create(config)
    with Uploads(config, print) as uploads:
        uploads.start()
        uploads.wake()

    assert uploads.row() == {}
    assert uploads.needed() == set()
    assert not (directory.path / "run-id").exists()
    assert restore(config, "auto", print) == []


async def test_a_place_that_fails_for_a_while_stops_nothing_and_is_said_once(config, there):
    there.parent.write_text("a file in its place")
    run, afterwards = [], []
    with held(config.run.path):
        directory = RunDirectory.create(config)
        with Uploads(config, afterwards.append) as uploads, uploads.told(run.append):
            uploads.start()
            await train_to(directory, 4, uploads=uploads)
            wait_for(lambda: uploads.row()["eopd_upload_failures_total"] >= 3)
            assert "eopd_uploaded_step" not in uploads.row()
            there.parent.unlink()
            wait_for(lambda: uploads.row().get("eopd_uploaded_step") == 4.0)
            wait_for(lambda: len(run) == 2)

    assert steps_at(there) == [4]
    assert run[0].startswith(f"run.upload: file://{there}: [Errno ")
    assert run[0].endswith("; trying again")
    assert run[1] == f"run.upload: file://{there} takes files again"
    assert afterwards == []


async def test_what_is_not_up_at_the_end_is_waited_for_and_named(config, there, monkeypatch):
    monkeypatch.setattr(upload, "SAY_AFTER_S", 0.1)
    monkeypatch.setattr(upload, "QUIET_S", 0.3)
    there.parent.write_text("a file in its place")
    said = []
    with held(config.run.path):
        directory = RunDirectory.create(config)
        with Uploads(config, said.append) as uploads:
            uploads.start()
            await train_to(directory, 4, 8)
            (directory.path / "hf").mkdir()
            (directory.path / "hf" / "model").write_text("m")

    failed, waits, missing = said
    assert failed.endswith("; trying again")
    names = (
        "checkpoints/step-000004, checkpoints/step-000008, config.yaml, run-id, summary.json, "
        "trained.jsonl, versions.json, hf"
    )
    assert waits == f"uploading to file://{there}: {names}; Ctrl-C ends the wait"
    assert missing.startswith(f"warning: run.upload: not up at file://{there}: {names} ([Errno")
    assert missing.endswith("the same command with --resume auto uploads it")


async def test_a_process_that_finds_the_run_complete_uploads_the_rest(config, there):
    directory = await uploaded(config, 4)
    before = files_of(there)
    (there / "checkpoints/step-000004/manifest.json").unlink()
    (there / "trained.jsonl").unlink()
    with held(directory.path), Uploads(config, print) as uploads:
        uploads.start()

    assert files_of(there) == before


async def test_a_checkpoint_of_the_same_step_is_replaced(config, there):
    directory = await uploaded(config, 4, 8)
    shutil.rmtree(directory.checkpoints / "step-000008")
    await train_to(directory, 8, resumes=1)
    with held(directory.path), Uploads(config, print) as uploads:
        uploads.start()

    manifest = "checkpoints/step-000008/manifest.json"
    assert files_of(there)[manifest] == files_of(directory.path)[manifest]
    state = "checkpoints/step-000008/state.json"
    assert files_of(there)[state] == files_of(directory.path)[state]


async def test_what_training_went_back_before_is_removed(config, there):
    directory = await uploaded(config, 4, 8)
    shutil.rmtree(directory.checkpoints / "step-000008")
    with held(directory.path), Uploads(config, print) as uploads:
        uploads.go_back(4)
        uploads.start()

    assert steps_at(there) == [4]
    assert uploads.row()["eopd_uploaded_step"] == 4.0


async def test_what_is_damaged_here_stays_there(config, there):
    directory = await uploaded(config, 4, 8)
    with held(directory.path), Uploads(config, print) as uploads:
        uploads.go_back(8)  # it continues from there
        uploads.start()
        (directory.checkpoints / "step-000008" / "learner" / "weights").write_text("")
        uploads.wake()

    assert [path.name for path in list_checkpoints(directory.checkpoints)] == ["step-000004"]
    assert steps_at(there) == [4, 8]


async def test_without_a_whole_checkpoint_here_nothing_is_removed_there(config, there):
    directory = await uploaded(config, 4, 8)
    shutil.rmtree(directory.checkpoints)
    with held(directory.path), Uploads(config, print) as uploads:
        uploads.start()

    assert steps_at(there) == [4, 8]


async def test_the_process_that_came_later_has_the_place(config, there):
    with held(config.run.path):
        directory = RunDirectory.create(config)
        said = []
        with Uploads(config, said.append) as uploads:
            uploads.start()
            await train_to(directory, 4, uploads=uploads)
            wait_for(lambda: uploads.row().get("eopd_uploaded_step") == 4.0)
            holder = {"host": "other", "pid": 7, "since": 1e9}
            (there / "run.lock").write_text(json.dumps(holder))
            wait_for(lambda: said)
            assert "is now uploaded to by process 7 on other" in said[0]
            await train_to(directory, 8, uploads=uploads)

    assert steps_at(there) == [4]
    assert json.loads((there / "run.lock").read_text()) == holder
    assert "checkpoints/step-000008" in said[-1]
    assert "process 7 on other" in said[-1]


def test_a_reader_has_the_file_that_was_there_or_the_new_one(config, there):
    place = Place(f"file://{there}")
    place.write("a", b"old")
    with (there / "a").open("rb") as reader:
        place.write("a", b"new")
        assert reader.read() == b"old"

    assert files_of(there) == {"a": b"new"}


# --- back from there


async def test_a_run_directory_that_is_gone_comes_back(config, there):
    directory = await uploaded(config, 4, 8)
    before = files_of(directory.path)
    shutil.rmtree(directory.path)
    said = []
    with held(directory.path):
        notes = restore(config, "auto", said.append)
        after = files_of(directory.path)

    before.pop("run.lock"), after.pop("run.lock")
    assert after == before
    assert notes == [f"restored from file://{there}, up to step 8"]
    assert said == [
        f"restoring {directory.path} from file://{there}: step-000004, step-000008, 0.00 GB"
    ]


async def test_what_is_half_there_is_passed_over(config, there):
    directory = await uploaded(config, 4, 8)
    shutil.rmtree(directory.path)
    (there / "checkpoints/step-000008/manifest.json").unlink()
    (there / "checkpoints/step-000012/learner").mkdir(parents=True)
    (there / "checkpoints/step-000012/learner/weights").write_text("w")
    with held(directory.path):
        notes = restore(config, "yes", print)

    folder = f"passing over file://{there}/checkpoints"
    missing = "manifest.json is missing: it was not uploaded to its end"
    assert notes == [
        f"{folder}/step-000008: {missing}",
        f"{folder}/step-000012: {missing}",
        f"restored from file://{there}, up to step 4",
    ]
    assert [path.name for path in list_checkpoints(directory.checkpoints)] == ["step-000004"]


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("state.json", "{}", "state.json is missing or has another size"),
        ("learner/weights", "v", "learner/weights has other bytes than were written"),
        ("manifest.json", "[", "manifest.json is not what was written"),
    ],
)
async def test_a_damaged_checkpoint_is_passed_over(config, there, name, content, why):
    directory = await uploaded(config, 4, 8)
    shutil.rmtree(directory.path)
    (there / "checkpoints/step-000008" / name).write_text(content)
    with held(directory.path):
        notes = restore(config, "yes", print)

    assert f"passing over file://{there}/checkpoints/step-000008: {why}" in notes
    assert [path.name for path in list_checkpoints(directory.checkpoints)] == ["step-000004"]


async def test_a_restoration_that_was_killed_is_done_again(config, there):
    directory = await uploaded(config, 4, 8)
    before = files_of(directory.path)
    shutil.rmtree(directory.checkpoints / "step-000008")
    (directory.checkpoints / ".step-000008.partial").mkdir()
    (directory.path / "metrics.jsonl").unlink(missing_ok=True)
    with held(directory.path):
        restore(config, "auto", print)
        assert files_of(directory.path).keys() - {"run.lock"} == before.keys() - {"run.lock"}


async def test_a_run_that_lost_its_checkpoints_gets_them_back(config, there):
    directory = await uploaded(config, 4, 8)
    shutil.rmtree(directory.checkpoints)
    with held(directory.path):
        assert restore(
            config,
            "yes",
            print,
        ) == [f"restored from file://{there}, up to step 8"]

    assert len(list_checkpoints(directory.checkpoints)) == 2


async def test_a_run_that_begins_in_an_old_directory_is_another_run(config, there):
    before = (await uploaded(config)).path / "run-id"
    first = before.read_text()
    await uploaded(config)
    assert before.read_text() != first
    assert (there / "run-id").read_text() == before.read_text()


async def test_the_run_that_went_on_further_counts(config, there, tmp_path):
    """Begun on one machine, gone on on another, and back on the first, where the learner was lost
    more often than the run was taken up.
    """
    first = await uploaded(config, 4, 8)
    first.write_summary(replace(first.read_summary(), incarnation=5, learner_restarts=5))
    other = configured(tmp_path, f"run.directory={tmp_path}/other")
    with held(other.run.path):
        restore(other, "auto", print)
        second = RunDirectory(other.run.path)
        with Uploads(other, print) as uploads:
            # taken up again it stopped before step 8, and is further all the same
            shutil.rmtree(second.checkpoints / "step-000008")
            uploads.go_back(4)
            uploads.start()
            await train_to(second, 6, resumes=1)

    assert steps_at(there) == [4, 6]
    with held(first.path):
        assert restore(
            config,
            "auto",
            print,
        ) == [f"restored from file://{there}, up to step 6"]
        # and nothing is fetched where the run here is as far
        assert restore(config, "auto", print) == []

    assert first.read_summary().incarnation == 1
    whole = [path.name for path in list_checkpoints(first.checkpoints)]
    assert whole == ["step-000004", "step-000006"], "step 8 is of a run that went back"


async def test_a_run_that_goes_back_while_others_are_removed_there_removes_its_own_next(
    config, there, monkeypatch
):
    directory = await uploaded(config, 4, 8, 12, keep_last=3)
    assert steps_at(there) == [4, 8, 12]
    shutil.rmtree(directory.checkpoints / "step-000004")
    with Uploads(config, print) as uploads:
        remove = Place.remove_folder

        def remove_and_go_back(place, name):
            if "000004" in name:
                shutil.rmtree(directory.checkpoints / "step-000012")
                uploads.go_back(8)

            remove(place, name)

        monkeypatch.setattr(Place, "remove_folder", remove_and_go_back)
        uploads.start()
        await fakes.until(lambda: steps_at(there) == [8])


async def test_a_restoration_that_is_killed_is_done_again(config, monkeypatch):
    directory = await uploaded(config, 4, 8)
    shutil.rmtree(directory.checkpoints)
    fetch = Place.get

    def killed(place, name, target):
        if name == "summary.json":
            raise KeyboardInterrupt

        fetch(place, name, target)

    with held(directory.path):
        monkeypatch.setattr(Place, "get", killed)
        with pytest.raises(KeyboardInterrupt):
            restore(config, "auto", print)

        assert len(list_checkpoints(directory.checkpoints)) == 2
        monkeypatch.setattr(Place, "get", fetch)
        assert restore(config, "auto", print)[-1].endswith("up to step 8")

    assert directory.read_summary() is not None


@pytest.mark.parametrize("number", [1, 2, 3, 4])
async def test_a_restoration_that_ends_in_any_file_is_done_again(config, monkeypatch, number):
    """On a new machine, where `require_no_foreign_files` looks at what it has left."""
    directory = await uploaded(config, 4)
    (directory.path / "changes.jsonl").touch()
    with held(directory.path), Uploads(config, print) as uploads:
        uploads.start()

    shutil.rmtree(directory.path)
    fetch, fetched = Place.get, []

    def fails(place, name, target):
        fetched.append(name)
        if len(fetched) == number:
            raise OSError("connection reset by peer")

        fetch(place, name, target)

    with held(directory.path):
        monkeypatch.setattr(Place, "get", fails)
        with pytest.raises(ConfigError, match="connection reset by peer"):
            restore(config, "auto", print)

        monkeypatch.setattr(Place, "get", fetch)
        require_no_foreign_files(directory.path)
        assert restore(config, "auto", print)[-1].endswith("up to step 4")


async def test_names_are_pinned_as_in_the_run_that_is_kept(config):
    directory = await uploaded(config, 4)
    shutil.rmtree(directory.path)
    assert config_to_continue(config, "no") is None
    assert config_to_continue(config, "auto") == config
    local = config.model_copy(update={"run": config.run.model_copy(update={"upload": None})})
    assert config_to_continue(local, "auto") is None


async def test_a_process_that_did_not_leave_in_order_is_named(config, there):
    directory = await uploaded(config, 4)
    holder = {"host": "other", "pid": 7, "since": 1e9}
    (there / "run.lock").write_text(json.dumps(holder))
    shutil.rmtree(directory.path)
    with held(directory.path):
        note = restore(config, "auto", print)[-1]

    assert note.startswith(f"file://{there}/run.lock names process 7 on other, since ")
    assert "stop it" in note


async def test_a_run_that_begins_is_refused_where_there_is_one(config, there):
    directory = await uploaded(config, 4, 8)
    shutil.rmtree(directory.path)
    with held(directory.path), pytest.raises(ConfigError) as refused:
        restore(config, "no", print)

    assert str(refused.value) == (
        f"run.upload: file://{there} holds a run already, with checkpoints up to step 8; continue "
        "it with --resume, or choose another run.name"
    )


async def test_another_run_of_that_name_is_refused(config, there, tmp_path):
    await uploaded(config, 4)
    other = configured(tmp_path, f"run.directory={tmp_path}/other")
    with held(other.run.path):
        await train_to(RunDirectory.create(other), 4)
        with pytest.raises(ConfigError, match=f"holds another run than .*; {DIFFERENT}"):
            restore(other, "auto", print)


async def test_a_run_without_a_whole_checkpoint_there_starts_over_with_auto_alone(config, there):
    directory = await uploaded(config, 4)
    shutil.rmtree(directory.path)
    (there / "checkpoints/step-000004/manifest.json").unlink()
    with held(directory.path):
        with pytest.raises(ConfigError, match="no checkpoint that is whole; step-000004: manifest"):
            restore(config, "yes", print)

        assert len(restore(config, "auto", print)) == 1

    assert not directory.checkpoints.exists()


# --- before anything starts


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3:/bucket", "must be s3://BUCKET/FOLDER, gs://BUCKET/FOLDER, or file://ABSOLUTE_PATH"),
        ("s3://key:secret@bucket/x", "must be s3://BUCKET/FOLDER"),
        ("http://host/x", "must be s3://BUCKET/FOLDER"),
        ("file://relative", "must be s3://BUCKET/FOLDER"),
    ],
)
def test_an_address_of_another_kind_is_refused(tmp_path, url, message):
    with pytest.raises(ConfigError, match=r"run\.upload: ") as refused:
        configured(tmp_path, f"run.upload={url}")

    assert message in str(refused.value)


def test_a_place_that_takes_no_files_is_one_message(config, there):
    there.parent.write_text("a file in its place")
    with pytest.raises(ConfigError, match=f"^run.upload: file://{there} cannot be written: "):
        require_upload(config.run)


def test_a_place_that_takes_files_keeps_none_of_the_probe(config, there):
    require_upload(config.run)
    assert files_of(there) == {}


@pytest.mark.parametrize(
    ("url", "package", "extra"), [("s3://bucket", "s3fs", "s3"), ("gs://bucket", "gcsfs", "gcs")]
)
def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch, url, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(_registry, url.partition(":")[0], raising=False)
    with pytest.raises(ConfigError) as refused:
        require_upload(configured(tmp_path, f"run.upload={url}").run)

    assert f"{url}/r needs a package that is not installed" in str(refused.value)
    assert str(refused.value).endswith(f"pip install 'eopd[{extra}]'")


def test_a_disk_that_is_not_mounted_is_a_mistake_and_nothing_is_made(tmp_path):
    config = configured(tmp_path, f"run.upload=file://{tmp_path}/disk/backup")
    with pytest.raises(
        ConfigError, match=rf"there is no folder {tmp_path}/disk to hold backup; make"
    ):
        require_upload(config.run)

    assert not (tmp_path / "disk").exists()
    (tmp_path / "disk").mkdir()
    require_upload(config.run)


@pytest.mark.parametrize("folder", ["runs", "runs/r/elsewhere"])
def test_the_run_directory_itself_is_refused(tmp_path, folder):
    config = configured(tmp_path, f"run.upload=file://{tmp_path}/{folder}")
    with pytest.raises(ConfigError, match="is in the run directory"):
        require_upload(config.run)
