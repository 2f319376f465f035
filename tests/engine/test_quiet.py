"""What is said of an error is one line of a length that a terminal can show."""

from slimstep.engine.quiet import bounded, one_line, preview


def test_a_line_keeps_its_beginning_and_its_end_within_600_characters():
    names = ", ".join(f"lora_unet_{i}.hada_w1_a" for i in range(2000))
    line = one_line(ValueError(f"these are left:\n\n {names}\nthe way out is at the end"))
    assert len(line) == 600 and "\n" not in line
    assert line.startswith("these are left: lora_unet_0") and line.endswith(" the way out is at the end")
    assert bounded(line) == line


def test_a_short_line_is_itself():
    assert bounded("a  b\n c") == "a b c" and one_line(KeyError()) == ""


def test_names_are_shown_by_their_first_and_their_number():
    assert preview(["a", "b", "c"]) == "a, b, c" and preview([]) == ""
    assert preview(str(i) for i in range(10)) == "0, 1, 2 and 7 more"
    assert len(preview(["x" * 1000] * 1000)) < 330
