"""The relation table of kin, checked against a simulated family."""

from thinkstack.tasks.puzzles.kin import HOPS, NEXT, TERMS


class Person:
    """A person of the simulated family."""

    def __init__(self, is_woman, father=None, mother=None):
        self.is_woman, self.father, self.mother, self.children = is_woman, father, mother, []

    def bear(self, spouse, *sexes, among=None):
        """Create children in order of age, with the existing person `among` in the middle."""
        parents = (spouse, self) if self.is_woman else (self, spouse)
        born = [Person(sex, *parents) for sex in sexes]
        if among:
            among.father, among.mother = parents
            born.insert(len(born) // 2, among)
        for parent in parents:
            parent.children = born
        return born

    def hop(self, name):
        """Return everybody with this relation to the person."""
        if name in ("father", "mother"):
            return {getattr(self, name)} - {None}
        if name in ("son", "daughter"):
            return {child for child in self.children if child.is_woman == (name == "daughter")}
        if self.father is None:
            return set()
        age, sex = name.split()
        born = self.father.children
        place = born.index(self)
        near = born[:place] if age == "elder" else born[place + 1 :]
        return {sibling for sibling in near if sibling.is_woman == (sex == "sister")}


def family_of(me):
    """Build three generations up, each person with elder and younger siblings, three down, cousins, nephews, nieces."""
    up = [me]
    for _ in range(3):
        above = []
        for person in up:
            father, mother = Person(False), Person(True)
            siblings = father.bear(mother, False, True, False, True, among=person)
            for sibling in siblings:
                if sibling is not person:
                    sibling.bear(Person(not sibling.is_woman), False, True, False, True)
            above += [father, mother]
        up = above
    down = me.bear(Person(not me.is_woman), False, True, False, True)
    for _ in range(2):
        down = [
            child for person in down for child in person.bear(Person(not person.is_woman), False, True, False, True)
        ]


def reached(people, *walks):
    """Return everybody at the end of any walk; "brother" and "sister" mean both ages, "child" both sexes."""
    found = set()
    for walk in walks:
        here = set(people)
        for step in walk.split(">"):
            hops = [hop for hop in HOPS if hop == step or hop.endswith(f" {step}")]
            here = {after for person in here for hop in hops for after in person.hop(hop)}
        found |= here
    return found


OF_THE_NAME, OTHER = ["father>brother>{}"], ["father>sister>{}", "mother>brother>{}", "mother>sister>{}"]
WALKS = {hop: [hop] for hop in HOPS} | {
    f"{parent}'s {hop}": [f"{parent}>{hop}"] for parent in ("father", "mother") for hop in ("father", "mother")
}
WALKS |= {f"father's {hop}": [f"father>{hop}"] for hop in ("elder brother", "younger brother", "sister")}
WALKS |= {f"mother's {hop}": [f"mother>{hop}"] for hop in ("brother", "sister")}
for child, sex in (("son", "male"), ("daughter", "female")):
    WALKS[f"{sex} cousin of the name"] = [walk.format(child) for walk in OF_THE_NAME]
    WALKS[f"{sex} cousin"] = [walk.format(child) for walk in OTHER]
    WALKS |= {f"{near}'s {child}": [f"{near}>{child}"] for near in ("brother", "sister", "son", "daughter")}
    WALKS[f"son's son's {child}"] = [f"son>son>{child}"]
for hop in ("father", "mother", "elder brother", "younger brother", "sister"):
    WALKS[f"grandfather's {hop}"] = [f"father>father>{hop}"]


def test_every_step_between_relatives_has_a_unique_answer_in_a_real_family():
    """From every person of a relation, the hop leads only to people of the relation in the table."""
    me = Person(False)
    family_of(me)
    assert set(WALKS) == set(TERMS)
    people = {relation: reached([me], *walks) for relation, walks in WALKS.items()}
    for relation, row in NEXT.items():
        for hop, result in row.items():
            found = {after for person in people[relation] for after in person.hop(hop)}
            assert found and found <= people[result], (relation, hop, result)
            assert me not in found


def test_chinese_terms_distinguish_relations_that_english_does_not():
    assert len({zh for _, zh in TERMS.values()}) == len(TERMS) > len({en for en, _ in TERMS.values()})
