"""The verdict of protocol agrpo on GSM8K: a hundred answers, by the rule in docs/tasks.md."""

from agrpo_megatron.tasks.benchmarks import verdict

RIGHT = [  # (gold, answers that are right)
    ("5", ["5", " 5 ", "5.", "5.0", "5.00", "+5", "05", "$5", "\\$5", "5$", "(5)", "{5}", "5%"]),
    ("5", ["5 dollars", "5 eggs", "5eggs", "5-year-old", "\\text{5}", "\\mathbf{5}", "**5** eggs"]),
    ("5", ["x = 5", "5 = 5", "5\\text{ cm}", "5 cm\u00b2", "5 (or 6)", "Answer: 5", "#### 5"]),
    (
        "5",
        ["5 million", "5 dozen", "10/2", "2 \u00d7 2 + 1", "\\frac{10}{2}", "5, he said"],
    ),
    (
        "1200",
        ["1200", "1,200", "$1,200", "1,200 meters", "1{,}200", "1\\,200", "1,200.00", "3*400"],
    ),
    ("1,200", ["1200", "1,200", "1,200 m"]),
    ("2.5", ["2.5", "2.50", "$2.50", "5/2", "2\u00bd", "2\\frac{1}{2}", "2.5 kg"]),
    ("0.5", [".5", "0.5", "\u00bd", "\\frac{1}{2}", "1/2", "$.50"]),
    ("-5", ["-5", "\u22125", "- 5", "-5 degrees", "(-5)"]),
]
WRONG = [  # (gold, answers that are wrong)
    ("5", ["", "five", "6", "15", "51", "-5", "\u22125", "- 5", "-$5", "-(5)", "negative 5"]),
    ("5", [".5", "$.5", "5.5", "0.5", "5.01", "-.5", "minus 5", "5e3"]),
    (
        "5",
        [
            "5*7",
            "5 * 7",
            "5 \u00d7 7",
            "5\u00d77",
            "5 x 7",
            "5x7",
            "5 X 7",
            "5 \u22c5 7",
            "5\\times 7",
        ],
    ),
    (
        "5",
        [
            "5\u00f72",
            "5/2",
            "5 / 2",
            "5+2",
            "5 + 2",
            "5-10",
            "5\u201310",
            "5\u201410",
            "5 - 10 eggs",
        ],
    ),
    (
        "5",
        [
            "5^2",
            "5^{2}",
            "5\u00b2",
            "5\u00b3",
            "5**2",
            "5 ** 2",
            "\\sqrt{5}",
            "\\frac{5}{2}",
            "5 over 2",
        ],
    ),
    ("5", ["5 and 6", "5 or 6", "5 to 6", "5, 6", "5; 6", "5 6", "5,6", "5 plus 2", "5 \\pm 2"]),
    (
        "3",
        [
            "3 1/2",
            "3\\frac{1}{2}",
            "3\\frac12",
            "3\u00bd",
            "3 \u00bd",
            "3\u00bd cups",
            "3 1/2 cups",
        ],
    ),
    ("3", ["3 and 1/2", "3 and a half", "3:30", "3:30 pm", "3,000", "3.14", "3'4"]),
    ("25", ["$.25", ".25", "$0.25", "2.5", "2 5", "25,000", "25*4"]),
    ("1", ["1/2", "\u00bd", "1{,}200", "1\\,200", "1 200", "1\u202f200"]),
]
CASES = [
    *((gold, answer, True) for gold, answers in RIGHT for answer in answers),
    *((gold, answer, False) for gold, answers in WRONG for answer in answers),
]


def test_the_table_has_a_hundred_answers():
    assert len({(gold, answer) for gold, answer, _ in CASES}) == len(CASES) >= 100


def test_an_answer_is_right_by_the_rule():
    wrong = []
    for gold, answer, right in CASES:
        text = f"<think>t</think>\n<answer>\\boxed{{{answer}}}</answer>"
        fields = {"question": "?", "answer": gold, "rationale": ""}
        if verdict("gsm8k", "agrpo", fields, text).correct != right:
            wrong.append((gold, answer, right))
    assert wrong == []
