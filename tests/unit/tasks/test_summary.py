from pdvit.tasks.summary import describe_summary


def test_a_number_that_json_can_not_hold_is_shown_as_nan():
    summary = {"split": "test", "accuracy": 0.5, "loss": None, "similarity_first": 0.25, "similarity_last": None}
    assert describe_summary(summary).startswith("test accuracy 50.0%, loss nan; P of the patches: first 0.25, last nan")
