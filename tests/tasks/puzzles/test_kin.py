"""The relations of kinship problems, found again in a family of people."""

from thinkstack.tasks.puzzles.kin import HOPS, NEXT, TERMS


class Person:
    """Somebody in a drawn-out family."""

    def __init__(self, is_woman, father=None, mother=None):
        self.is_woman, self.father, self.mother, self.children = is_woman, father, mother, []

    def bear(self, spouse, *sexes, among=None):
        """Children in order of age, with the person `among` in their middle."""
        parents = (spouse, self) if self.is_woman else (self, spouse)
        born = [Person(sex, *parents) for sex in sexes]
        if among:
            among.father, among.mother = parents
            born.insert(len(born) // 2, among)
        for parent in parents:
            parent.children = born
        return born

    def hop(self, name):
        """Everybody who is this to the person."""
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
    """Three generations up, all with brothers and sisters of either age; three down; cousins, nephews and nieces."""
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


def reached(people, *ways):
    """Everybody at the end of any of the walks; "brother" and "sister" stand for both ages, "child" for both sexes."""
    found = set()
    for way in ways:
        here = set(people)
        for step in way.split(">"):
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
    WALKS[f"{sex} cousin of the name"] = [way.format(child) for way in OF_THE_NAME]
    WALKS[f"{sex} cousin"] = [way.format(child) for way in OTHER]
    WALKS |= {f"{near}'s {child}": [f"{near}>{child}"] for near in ("brother", "sister", "son", "daughter")}
    WALKS[f"son's son's {child}"] = [f"son>son>{child}"]
for hop in ("father", "mother", "elder brother", "younger brother", "sister"):
    WALKS[f"grandfather's {hop}"] = [f"father>father>{hop}"]


def test_every_step_between_relatives_has_one_sole_answer_in_a_real_family():
    """From everybody who is some relation to me, the hop leads to people of the relation named and to no others."""
    me = Person(False)
    family_of(me)
    assert set(WALKS) == set(TERMS)
    people = {relation: reached([me], *ways) for relation, ways in WALKS.items()}
    for relation, row in NEXT.items():
        for hop, result in row.items():
            found = {after for person in people[relation] for after in person.hop(hop)}
            assert found and found <= people[result], (relation, hop, result)
            assert me not in found


def test_the_chinese_terms_tell_apart_what_english_does_not():
    assert len({zh for _, zh in TERMS.values()}) == len(TERMS) > len({en for en, _ in TERMS.values()})
