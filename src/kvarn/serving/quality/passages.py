"""English to measure on: remarks as people make them at a table. Written for kvarn: nothing need be downloaded."""

from __future__ import annotations

from typing import Final

PASSAGES: Final = (
    "The old mill by the river stopped working in the winter when the wheel froze. My grandfather was the last one "
    "who knew how to dress the stones, and he taught it to nobody. For years the building stood empty, and swallows "
    "nested under its roof. Then a couple from the city bought it, dried out the cellar and put in a small turbine. "
    "Now it lights eleven houses, and on Saturdays they sell bread that is baked in the room where the flour used to "
    "be weighed. The bread is a little too salty, but people come for the view.",
    "I have looked at the figures for the bus line again. In the morning it is full as far as the hospital and nearly "
    "empty after that; in the evening it is the other way round. If we let every second bus turn at the hospital, we "
    "save two drivers a day, and nobody waits longer than twelve minutes. The people at the end of the line will not "
    "like it. I would offer them a taxi that they can call, which costs less than a bus that carries air.",
    "Bees do not like dark clothes or people who have eaten bananas. That sounds like superstition, but the scent is "
    "close to the one they use as an alarm. I keep nine hives behind the school. Last spring three of them died, and "
    "I thought of giving up. Then a swarm settled in the apple tree by itself, as if somebody had sent it. This year "
    "the lime trees flowered early, so the honey is light and thin, and it sets within a week.",
    "The tide tables are wrong for our harbour by about twenty minutes, because they are made for the lighthouse. "
    "Fishermen know that, visitors do not. Every summer somebody walks out to the sandbank at low water, takes a nap "
    "and has to be fetched with a boat. We have put up a sign in four languages. What would help more is a bell that "
    "rings when the water turns, as there was one before the war. The tower for it still stands.",
    "When the library moved, we carried the books in a chain of people from one building to the other. Four hundred "
    "came, children too. It took a day and a half, and only one box got lost, with atlases in it. What surprised me "
    "was how much people read while they passed the books on. Somebody would open one, laugh, show it to the next, "
    "and the chain would stop. In the end we had a list of some sixty books that had been reserved on the way.",
    "A bicycle brake squeals because the pad touches the rim with its rear edge first. You turn it so that the front "
    "edge comes first, by the thickness of a playing card. Oil makes it quiet, too, but then it does not brake any "
    "more. I have told this to at least a thousand customers. Half of them nod and come back with the same noise. The "
    "other half come back as well, since they have found out what else they can repair by themselves.",
    "My aunt cooked her soup for six hours and never let it boil. She said that a soup which boils gets angry. The "
    "bones went in cold, then carrots, then nothing for a long time. At noon she took out a cup for the cat. Salt "
    "came last, when the fire was out already. I have tried it with a thermometer and with a timer, and mine is "
    "always a little cloudy. I think that she was simply more patient than any device I own.",
    "We have measured the noise at the crossing for a month. By day it is the lorries, which is what all of us "
    "expected. By night it is not the cars at all but the signal for the blind, which clicks against the wall of the "
    "theatre and comes back. It can be turned down after ten in the evening without harm; the standard says so. The "
    "repair costs next to nothing. I suggest that we do it next week and see whether the letters stop.",
    "In chess you lose most games not by a bad plan but by not looking for one more second. My teacher made us sit on "
    "our hands. He said that the move which you want to play at once is the one that your opponent has waited for. "
    "When I teach children now, I let them say what the other side would like to do next. They find it out quickly. "
    "What they find hard is to believe that the other one is as clever as they are.",
    "The storm took the roof of the greenhouse and left the panes in a heap that looked like ice. Of the tomatoes, "
    "the small ones lived. We have covered the beds with the sails of an old boat, which let through enough light. If "
    "the insurance pays, I want to build it lower and turn it to the south. If it does not pay, we shall have sails "
    "for a year. The cucumbers do not seem to mind; they have never grown so well.",
    "Our choir has too many altos and only two tenors, and one of them is moving away. We could sing pieces without "
    "tenors, but there are few, and they are sad. Or some of the altos sing tenor, which they can, although none of "
    "them wants to say so first. I have asked the baker, who whistles in tune. He says that he cannot read music. "
    "Neither can half of the basses, I told him, and they have been with us for twenty years.",
    "The well in the square was closed because of a single bad sample. Since then we have taken forty good ones. The "
    "office says that the rule asks for a year without a finding, and the year ends in March. Until then a tank lorry "
    "comes on Tuesdays and Fridays. It is expensive, and the water tastes of hose. I have written to the district. "
    "They answered politely that the rule was made to protect us, which I do not doubt.",
    "To learn a language late, you must be ready to sound like a child for two years. I learned it at the market. The "
    "woman who sold potatoes corrected every word, and she never let me go before I had said it right. Once there was "
    "a queue of ten behind me, and all of them said the word together. I have not forgotten it since. In the classes "
    "at the town hall nobody laughs, and that may be why nobody learns anything.",
    "The clock on the tower loses four minutes a week in summer and gains one in winter, since its pendulum is made "
    "of iron and grows when it is warm. I climb up every Sunday and set it. They have offered me an electric drive. "
    "It would be right to the second, and nobody would ever have to go up again. But then nobody would see that a "
    "slate is missing or that the doves have got in, and in ten years they would need a new tower.",
    "For the fair we need sixty tables, and we have thirty-eight. The fire brigade can lend us a dozen if we fetch "
    "them. The rest could be doors on trestles; there are some in the cellar of the school, from when the classrooms "
    "were made larger. Cloth hides everything. What we do not have is shade. Last year it was so hot that the "
    "chocolate ran off the cakes. I would put the tables under the plane trees, even if that means that the band "
    "plays on the road.",
    "A map is a list of what somebody thought worth drawing. On the oldest one of our valley there are eleven "
    "springs, three chapels and a gallows, but no road. On the newest there are roads only. I have walked with both "
    "of them in my hand. Seven of the springs still run, one of them below a car park, where you can hear it through "
    "a grating. I want to make a map of what can be heard. People smile at that until I take them to the grating.",
)  # fmt: skip
"""Some 90 words each."""

MEMORIES: Final = (
    "On the first day I went to the market and bought pears.", "I promised my sister to write to her about the house.",
    "The doctor told me to walk more and to worry less.", "Somebody returned my umbrella without leaving a name.",
    "I found an old photograph of the bridge, with snow on it.", "The neighbours' dog has learned to open our gate.",
    "I said at the meeting that I would rather wait until spring.", "The train was late, so I missed the beginning.",
    "I have agreed to look after the keys until the others are back.", "It rained so hard that the cellar was flooded.",
    "My tooth hurts when I drink something cold.", "The new teacher plays the violin in the evening.",
    "I counted the money twice and it was four coins short.", "We argued about the fence and made up over tea.",
    "I dreamed of a staircase that had no end.", "They painted the benches green, and now nobody sits there.",
    "The letter from the district came back unopened.", "I lent the ladder to the carpenter last week.",
    "There was a rehearsal on Thursday, and I was the only one on time.", "The price of coal has gone up again.",
    "I planted two rows of beans behind the shed.", "The lamp at the corner flickers when a tram passes.",
    "A stranger asked me the way to the mill and spoke of my grandfather.", "I still have to repair the chair.",
)  # fmt: skip
NAMES: Final = ("Ada", "Bruno", "Clara", "David", "Emma", "Felix", "Greta", "Hugo")
TRADES: Final = ("a baker", "a nurse", "a teacher", "a carpenter", "a gardener", "a clerk", "a cook", "a mechanic")
FACTS: Final = (
    ("What is the password of the tower?", "The password of the tower is"),
    ("What is the name of the boat?", "The name of the boat is"),
    ("What is the miller's cat called?", "The miller's cat is called"),
    ("What is shown on the stamp?", "The stamp on the letter shows a"),
    ("What is the prize of the lottery?", "The prize of the lottery is a"),
    ("After what is the street beside the station named?", "The street beside the station is named after the"),
    ("What is painted on the door of the inn?", "The door of the inn is painted with a"),
    ("What did the clerk draw on the envelope?", "The clerk drew on the envelope a"),
)  # fmt: skip
"""A question, and how its answer begins; a word of SECRETS follows."""
SECRETS: Final = (
    "marble", "walnut", "copper", "violet", "harvest", "lantern", "pepper", "saddle", "thunder", "velvet", "window",
    "castle", "feather", "garden", "island", "orange", "pencil", "silver", "basket", "candle", "dragon", "falcon",
    "hammer", "jacket", "kettle", "lemon", "mirror", "needle", "oyster", "pillow", "rocket", "turtle",
)  # fmt: skip
TASKS: Final = (
    "Say in your own words what you think of all this.", "What should be done first, and by whom?",
    "Sum up what the others said.", "With whom do you agree most, and why?", "What was left out?",
    "Write a short letter about it to a friend.",
)  # fmt: skip
