import pytest

from experiments.planning import hlo

TEXT = """HloModule jit_f, is_scheduled=true, entry_computation_layout={(f32[2,3]{1,0})->f32[]}

%fused (p.0: f32[2,3]) -> f32[2,3] {
  %p.0 = f32[2,3]{1,0:T(8,128)S(1)} parameter(0)
  ROOT %neg.1 = f32[2,3]{1,0:T(8,128)} negate(%p.0), metadata={op_name="jit(f)/neg"}
}

ENTRY %main.4 (x: f32[2,3]) -> (f32[2,3], s32[]) {
  %x = f32[2,3]{1,0:T(8,128)} parameter(0), metadata={op_name="x"}
  %c = s32[2]{0:T(128)} constant({-4, 7})
  %s.1 = ((f32[2,3]{1,0:T(8,128)}, /*index=1*/f32[2,3]{1,0}), u32[]{:S(2)}) copy-start(%x)
  %f = f32[2,3]{1,0:T(8,128)} fusion(%x), kind=kLoop, calls=%fused, backend_config={"a":{"b":1}}
  ROOT %t = (f32[2,3]{1,0}, s32[]) tuple(%f, %c), dimensions={1,0}
}
"""


def test_reads_computations_and_their_instructions():
    module = hlo.read(TEXT)
    assert module.entry == "main.4" and module.scheduled
    assert list(module.computations) == ["fused", "main.4"]
    main = module.computations["main.4"]
    assert [i.op for i in main.instructions] == [
        "parameter", "constant", "copy-start", "fusion", "tuple"
    ]  # fmt: skip
    assert main.root.name == "t" and main.root.operands == ("f", "c")
    assert main.by_name["f"].called == ("fused",)
    assert main.root.ints("dimensions") == (1, 0)
    assert main.by_name["c"].literal == "{-4, 7}"
    assert [len(i.shapes) for i in main.instructions] == [1, 1, 3, 1, 2]
    assert module.computations["fused"].root.source == "jit(f)/neg"
    assert main.by_name["f"].source == "f"


@pytest.mark.parametrize(
    ("text", "bytes", "logical"),
    [
        ("f32[2,3]", 24, 24),
        ("f32[2,3]{1,0:T(8,128)}", 8 * 128 * 4, 24),
        ("f32[2,3]{0,1:T(8,128)}", 8 * 128 * 4, 24),
        ("bf16[5,16,128]{2,1,0:T(8,128)(2,1)}", 5 * 16 * 128 * 2, 5 * 16 * 128 * 2),
        ("f32[16,300]{0,1:T(8,128)}", 304 * 128 * 4, 16 * 300 * 4),
        ("s32[]{:T(128)}", 4, 4),
        ("f32[2,3]{1,0:T(8,128)S(1)}", 0, 24),
        ("f8e4m3fn[7]{0}", 7, 7),
        ("s4[8]{0}", 4, 4),
        ("pred[3]{0}", 3, 3),
    ],
)
def test_bytes_are_those_of_whole_tiles_in_main_memory(text, bytes, logical):
    (shape,) = hlo.shapes(text)
    assert (shape.bytes, shape.logical_bytes) == (bytes, logical)


def test_other_text_and_types_are_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.read("module @jit_f {}")
    with pytest.raises(ValueError, match="x7"):
        hlo.bits("x7")


@pytest.mark.parametrize(
    ("text", "places"),
    [
        ("s32[2,3]", [0, 1, 2, 3, 4, 5]),
        ("s32[2,3]{0,1}", [0, 3, 1, 4, 2, 5]),
        ("s32[2,3]{1,0:T(2,2)}", [0, 1, 3, 4, 2, -1, 5, -1]),
        ("s32[2,3]{0,1:T(2,2)S(1)}", [0, 3, 1, 4, 2, 5, -1, -1]),
        ("s8[2,4]{1,0:T(2,2)(2,1)}", [0, 4, 1, 5, 2, 6, 3, 7]),
        ("s32[3]{0:T(1,2)}", [0, 1, 2, -1]),
    ],
)
def test_places_in_memory(text, places):
    (shape,) = hlo.shapes(text)
    assert shape.places().tolist() == places
