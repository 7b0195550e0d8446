import io
import pickle
from functools import partial

import numpy as np
import pytest

from pdvit.plots.heatmap import read_confusion
from pdvit.plots.reading import analyze_again, read_run
from pdvit.plots.segmentation import read_segmentation
from pdvit.plots.sweep import read_cells
from tests.errors import refused

MATRIX, CELLS = "class,predicted,images\n", "cell,status\n"
HEAD = "model,layer,depth,metric,mean,std,ci95,images,tokens\n"
read_analysis = partial(read_run, name="")
TABLES = [
    *((read_analysis, "analysis.csv", text) for text in ("", "no,table\n1,2\n", "a\nb,c\nd,e,f\n", "\0\1", HEAD)),
    *((read_analysis, "analysis.csv", f"{HEAD}r,embed,{cells},0,0,1,4\n") for cells in ("0,P,high", ",P,0.5")),
    *((read_segmentation, "iou.csv", text) for text in ("", "a,b\n1,2\n", "class,pixels,iou\nx,many,0.5\n")),
    *((read_confusion, "confusion.csv", text) for text in ("", "a,b\n1,2\n", "\0" * 9, MATRIX)),
    *((read_confusion, "confusion.csv", MATRIX + rows) for rows in ("a,a,x\n", "a,a,1\na,a,2\n", "a,a,-1\n")),
    *((read_confusion, "confusion.csv", MATRIX + rows) for rows in ("a,a\n", "a,b,1\n", 'a,"a,1\n')),
    *((read_cells, "cells.csv", text) for text in ("", "cell\n0\n", CELLS, "cell,status,a\n0\n")),
    *((read_cells, "cells.csv", CELLS + rows) for rows in ("0,1,2\n", '0,"x\n')),
]


def test_a_model_called_na_keeps_its_name_and_the_checkpoint_is_the_run(tmp_path, analysis_table):
    analysis_table([0.1, 0.2, 0.3]).assign(model="NA").to_csv(tmp_path / "analysis.csv", index=False)
    assert read_run(tmp_path, "one").table["model"].unique().tolist() == ["NA"]
    assert analyze_again(tmp_path) == f"pdvit analyze {tmp_path}"


def test_a_damaged_file_of_curves_is_named_and_one_with_objects_is_not_executed(tmp_path, analysis_folder):
    run, objects = analysis_folder(tmp_path / "run"), io.BytesIO()
    np.savez(objects, histogram=np.array([{}], dtype=object))
    for content in (b"", b"PK", b"no archive", pickle.dumps({}), objects.getvalue()):
        (run / "analysis" / "pairs.npz").write_bytes(content)
        with refused("damaged", tip=f"{run}.safetensors --images 'a b' --out {run} --metrics cka,pairs --explore"):
            read_run(run, "one", "pairs")


@pytest.mark.parametrize(("read", "name", "content"), TABLES)
def test_a_damaged_table_is_named_with_the_command_that_makes_it(tmp_path, read, name, content):
    (tmp_path / name).write_text(content)
    tips = {"cells.csv": "folder of a sweep", "analysis.csv": f"pdvit analyze {tmp_path}"}
    with refused("damaged", tip=tips.get(name, f"pdvit eval {tmp_path}")) as caught:
        read(tmp_path)
    assert caught.value.where == str(tmp_path / name)
