"""`lorarecycle report` and `recycle --report`, from folders to a page."""

import numpy as np
import pytest
from PIL import Image

from lorarecycle.cli.main import main

pytestmark = pytest.mark.medium


@pytest.fixture
def photos(tmp_path, make_data):
    data = make_data(per_class=8)
    for i, (image, label) in enumerate(zip(data.images, data.labels, strict=True)):
        folder = tmp_path / "photos" / data.class_names[int(label)]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy())).save(folder / f"{i}.png")
    return tmp_path / "photos"


def test_recycle_writes_a_report_and_report_writes_it_again(tmp_path, photos, make_adapter, capsys):
    from lorarecycle import Backbone

    backbone = Backbone.load("demo")
    for i in range(2):
        make_adapter(backbone, seed=i, size=0.05).save(tmp_path / "adapters" / f"a{i}")
    output = tmp_path / "meta"
    settings = ["--inversion.pictures", "12", "--meta.steps", "2", "--base", "demo", "--dtype", "float32", "--quiet"]
    args = ["recycle", str(tmp_path / "adapters"), "--output", str(output), "--report", *settings]
    assert main(args) == 0
    page = tmp_path / "meta-run" / "report.html"
    assert capsys.readouterr().out.split() == [str(output), str(page)]
    assert "has not been measured" in page.read_text(encoding="utf-8")
    tasks = ["--n-way", "3", "--n-query", "3", "--n-tasks", "5"]
    data = ["--data", str(photos), "--adapters", str(tmp_path / "adapters"), *tasks, "--quiet"]
    assert main(["report", str(tmp_path / "meta-run"), *data, "--dtype", "float32"]) == 0
    assert "average of the adapters" in page.read_text(encoding="utf-8")
    assert main(["report", str(tmp_path / "meta-run"), "--output", str(page / "inner.html")]) == 2
    assert "`--output` must be a place that can be written to, got" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert "must be the `work_dir` of a run" in capsys.readouterr().err
