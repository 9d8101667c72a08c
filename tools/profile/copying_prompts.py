"""Texts for ``copying``, written for it: tasks whose answers repeat them, and questions whose answers do not."""

from __future__ import annotations

LIGHTHOUSE = """
The lighthouse at Cape Wren stands on a narrow ledge of granite above the sea. It was built by a family of masons who
carried every stone along the cliff on their backs, because no cart could pass. For ninety years a keeper climbed the
hundred and twelve steps each evening to light the lamp, and each morning to put it out again. On clear nights the beam
could be seen from the fishing villages on the far side of the bay, and on foggy nights a bell was rung by hand, once
every minute, until the fog had gone. The last keeper, a quiet man named Thomas, kept a notebook in which he wrote down
the weather, the ships that passed, and the birds that rested on the railing. When the lamp was made electric he stayed
on in the small white house beside the tower, and visitors still find him there, mending nets and telling stories.
"""
MARKET = """
Every Saturday the market opens before the sun is up. Farmers from the valley bring apples, pears, onions and potatoes
in wooden boxes, and the baker brings four kinds of bread that are still warm. By seven o'clock the square is full of
people, and the old clock above the town hall can hardly be heard. Children run between the stalls, dogs sleep under the
tables, and a man with a violin plays beside the fountain. The cheese seller lets everyone taste before they buy, and
she remembers what each of her customers likes. At noon the stalls are folded up, the boxes are loaded onto the trucks,
and the square is swept until nothing is left of the market but a few leaves of lettuce and the smell of fresh coffee.
"""
RIVER = """
The river Alder begins as a spring under the roots of an oak, high in the northern hills. At first it is so narrow that
a child can step across it. Below the village of Stone it meets a second stream, and from there on it is deep enough for
small boats. In the past the river drove eleven mills, which ground wheat, sawed timber and made paper. Today only one
of the mills is left, and it has become a museum. The river bends twice around the town of Marlow, flows under a bridge
of seven arches, and widens into a lake where herons and swans spend the winter. Forty miles further on it reaches the
sea between two long beaches of grey sand.
"""
WORKSHOP = """
A good workshop needs light, order and a solid bench. Put the bench under a window, so that the light falls on the work
from the side. Hang the tools that you use every day on the wall within reach of your hand, and keep the others in
drawers with labels. Sharpen the blades before they are dull, for a dull blade slips and a sharp blade cuts. Sweep the
floor every evening, because dust hides screws and makes the boards slippery. Keep a box for pieces of wood that are too
small to be useful and too good to be thrown away. Before you cut, measure twice, and before you glue, put the pieces
together without glue to see whether they fit. When the work is done, oil the tools and close the window.
"""
PEOPLE = """
name: Anna Becker, age: 34, city: Hamburg, profession: carpenter
name: Luis Ortega, age: 41, city: Seville, profession: teacher
name: Mary Collins, age: 29, city: Dublin, profession: nurse
name: Pierre Martin, age: 52, city: Lyon, profession: baker
name: Ingrid Olsen, age: 38, city: Bergen, profession: engineer
name: Marco Rossi, age: 45, city: Turin, profession: mechanic
"""
ORDERS = """
[{"order": 1001, "customer": "Becker", "item": "oak table", "quantity": 1, "price": 420.0},
{"order": 1002, "customer": "Collins", "item": "reading lamp", "quantity": 2, "price": 35.5},
{"order": 1003, "customer": "Martin", "item": "bread knife", "quantity": 3, "price": 18.0},
{"order": 1004, "customer": "Olsen", "item": "wool blanket", "quantity": 2, "price": 64.0},
{"order": 1005, "customer": "Rossi", "item": "tool box", "quantity": 1, "price": 79.9}]
"""
CODE = """
def total_price(orders, discount):
    total = 0
    for order in orders:
        price = order.price * order.quantity
        if order.customer in discount:
            price = price * (1 - discount[order.customer])
        total = total + price
    return total

def most_expensive(orders):
    best = None
    for order in orders:
        if best is None or order.price > best.price:
            best = order
    return best
"""
MINUTES = """
The meeting began at nine o'clock. Anna reported that the new roof of the school is finished and that the work cost less
than planned. Luis asked whether the money that is left could be used for the library. Mary proposed to buy forty books
and two reading lamps. Pierre was against the lamps, because the windows of the library are large. The proposal to buy
forty books was accepted by five votes to one. Ingrid will order the books before the end of the month. Marco will build
a shelf for them. The next meeting is on the third of May at nine o'clock in the town hall. Coffee will be served.
"""


def _task(instruction: str, text: str) -> str:
    return f"{instruction}\n{text.strip()}"


COPYING = [
    _task('Repeat the following text word for word, but change the name "Thomas" to "Edward":', LIGHTHOUSE),
    _task('Repeat the following text word for word, but change "Saturday" to "Sunday":', MARKET),
    _task("Correct the spelling of the following text. If there are no mistakes, repeat the text:", RIVER),
    _task("Copy the following text exactly as it is:", WORKSHOP),
    _task("Write the following list again, line by line, in the same format:", PEOPLE),
    _task("Print the following JSON again, with each field on a line of its own:", ORDERS),
    _task("Rewrite the following Python code, renaming the variable total to result:", CODE),
    _task("Quote every sentence of the following minutes that mentions books or lamps, then repeat the rest:", MINUTES),
]
ORDINARY = [
    "Why do the leaves of many trees change their colour in autumn?",
    "Write a short story about a boy who finds a key in the garden.",
    "What should I think about before I adopt a dog from a shelter?",
    "Explain how a bicycle stays upright while it is moving.",
    "Describe how bread is made, from the grain to the loaf.",
    "What are the advantages and disadvantages of living in a small town?",
    "How did people keep food fresh before there were refrigerators?",
    "Write a letter to a friend in which you describe a walk along the sea.",
]
