// Prompts to begin with: a list for a small model's Python, and one for models that can write a page.

export const EXAMPLES = [
    {
        group: "For the models that ship: small Python tasks",
        prompts: [
            [
                "A loop with a dictionary",
                "# Loop over limit and return a dict of how often each occurs of the integers from 1 to limit, each negated.\ndef solve(limit):\n",
            ],
            ["Sum of some numbers", "# Return the sum of the numbers in xs that are greater than 17.\ndef solve(xs):\n"],
            [
                "Digits in a while loop",
                "# Using a while loop, return a sorted list without duplicates of the digits in limit that are less than 34, each negated.\ndef answer(limit):\n",
            ],
            [
                "Keys of a table",
                "# Loop over table and return a descending list of the keys in table that have an odd value, each in lower case.\ndef compute(table):\n",
            ],
            [
                "Running totals",
                "# With a for loop, find the running totals of the values in d that are multiples of 11, each floor divided by 10.\ndef solve(d):\n",
            ],
            ["One of two results", "# Return n negated if n is less than 35, otherwise n multiplied by 8.\ndef compute(n):\n"],
            [
                "Fill a hole in a line",
                "# Return the sum of the numbers in xs that are greater than 7.\ndef solve(xs):\n    return sum(⟦5⟧ if x > 7)\n",
            ],
            [
                "Fill a hole in a loop",
                "# Loop over table and return a dict of the entries of table, each value as a string.\ndef answer(table):\n    result = {}\n    for⟦8⟧\n        result⟦8⟧\n    return result\n",
            ],
        ],
    },
    {
        group: "For large chat models: a page to look at",
        chat: true,
        maxNewTokens: "1024",
        prompts: [
            ["Snake in HTML", "Implement the game Snake in HTML5, in one file. Include a reset button.\n"],
            ["A clock in HTML", "Write one HTML file that shows an analogue clock, drawn with SVG and moved by JavaScript.\n"],
        ],
    },
];
