"""Font families of the rendered sets: what each is called, where its faces lie, and which package carries them.

Three sources: matplotlib's own fonts (always there), Hershey stroke fonts (a pip extra) and Debian font packages,
unpacked below ``<data root>/fonts``. Each family is one domain of ``glyphs61``. Near relatives (the two Junicode
widths, NimbusSansNarrow and LiberationSansNarrow, NimbusRoman and STIX) belong on one side of a split.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moe.errors import NotFoundError
from workers.datasets._arrays import has_package, install_hint, package_folder
from workers.datasets.base import Missing

Source = Literal["matplotlib", "hershey", "debian"]
Style = Literal["sans", "serif", "mono", "italic", "script", "gothic", "hand", "decorative"]
SOURCES: tuple[Source, ...] = ("matplotlib", "hershey", "debian")
STYLES: tuple[Style, ...] = ("sans", "serif", "mono", "italic", "script", "gothic", "hand", "decorative")


@dataclass(frozen=True)
class Family:
    """One font family.

    Attributes:
        name: domain name.
        source: where it comes from.
        style: style group, for tables.
        faces: file names, or for Hershey the one font name.
        package: Debian package; empty otherwise.
    """

    name: str
    source: Source
    style: Style
    faces: tuple[str, ...]
    package: str = ""


def _faces(stem: str, *suffixes: str, ending: str = ".otf") -> tuple[str, ...]:
    return tuple(f"{stem}{suffix}{ending}" for suffix in suffixes)


def _matplotlib(name: str, style: Style, *faces: str) -> Family:
    return Family(name, "matplotlib", style, tuple(f"{face}.ttf" for face in faces or (name,)))


def _debian(name: str, style: Style, package: str, *faces: str) -> Family:
    return Family(name, "debian", style, faces, f"fonts-{package}")


_FOUR = ("-Regular", "-Bold", "-Italic", "-BoldItalic")

# 10 families, 19 faces with all digits and Latin capitals.
MATPLOTLIB: tuple[Family, ...] = (
    _matplotlib("DejaVuSans", "sans", *_faces("DejaVuSans", "", "-Bold", "-Oblique", "-BoldOblique", ending="")),
    _matplotlib("DejaVuSerif", "serif", *_faces("DejaVuSerif", "", "-Bold", "-Italic", ending="")),
    _matplotlib("DejaVuSansMono", "mono", "DejaVuSansMono", "DejaVuSansMono-Bold"),
    _matplotlib("STIX", "serif", "STIXGeneral", "STIXGeneralBol"),
    _matplotlib("STIXItalic", "italic", "STIXGeneralItalic", "STIXGeneralBolIta"),
    _matplotlib("cmr10", "serif", "cmr10", "cmti10"),
    _matplotlib("cmss10", "sans"),
    _matplotlib("cmtt10", "mono"),
    _matplotlib("cmb10", "serif"),
    _matplotlib("cmmi10", "italic"),
)
_HERSHEY: dict[str, Style] = {
    "futural": "sans",
    "futuram": "sans",
    "scripts": "script",
    "scriptc": "script",
    "timesr": "serif",
    "timesi": "italic",
    "timesib": "italic",
    "gothiceng": "gothic",
    "gothicger": "gothic",
    "gothicita": "gothic",
    "gothgbt": "gothic",
    "gothgrt": "gothic",
    "rowmans": "sans",
    "rowmant": "serif",
    "cursive": "script",
}
HERSHEY: tuple[Family, ...] = tuple(Family(name, "hershey", style, (name,)) for name, style in _HERSHEY.items())
DEBIAN: tuple[Family, ...] = (
    _debian("C059", "serif", "urw-base35", *_faces("C059", "-Roman", "-Bold", "-Italic", "-BdIta")),
    _debian("P052", "serif", "urw-base35", *_faces("P052", "-Roman", "-Bold", "-Italic", "-BoldItalic")),
    _debian(
        "URWBookman", "serif", "urw-base35", *_faces("URWBookman", "-Light", "-Demi", "-LightItalic", "-DemiItalic")
    ),
    _debian("URWGothic", "sans", "urw-base35", *_faces("URWGothic", "-Book", "-Demi", "-BookOblique", "-DemiOblique")),
    _debian("Z003", "script", "urw-base35", "Z003-MediumItalic.otf"),
    _debian("NimbusMonoPS", "mono", "urw-base35", *_faces("NimbusMonoPS", *_FOUR)),
    _debian("NimbusSans", "sans", "urw-base35", *_faces("NimbusSans", *_FOUR)),
    _debian(
        "NimbusSansNarrow",
        "sans",
        "urw-base35",
        *_faces("NimbusSansNarrow", "-Regular", "-Bold", "-Oblique", "-BoldOblique"),
    ),
    _debian("NimbusRoman", "serif", "urw-base35", *_faces("NimbusRoman", *_FOUR)),
    _debian(
        "FreeMono", "mono", "freefont-ttf", *_faces("FreeMono", "", "Bold", "Oblique", "BoldOblique", ending=".ttf")
    ),
    _debian("LinLibertine_R", "serif", "linuxlibertine", *_faces("LinLibertine_R", "", "B", "I", "BI")),
    _debian("LinBiolinum_R", "sans", "linuxlibertine", *_faces("LinBiolinum_R", "", "B", "I")),
    _debian("LinLibertine_M", "mono", "linuxlibertine", "LinLibertine_M.otf"),
    _debian("LinLibertine_DR", "decorative", "linuxlibertine", "LinLibertine_DR.otf"),
    _debian("Junicode", "serif", "junicode", *_faces("JunicodeTwoBeta", "-Regular", "-Bold", "-Italic")),
    _debian(
        "JunicodeExpanded", "serif", "junicode", *_faces("JunicodeTwoBeta-Expanded", "", "Bold", "Italic", "BoldItalic")
    ),
    _debian("EBGaramond12", "serif", "ebgaramond", *_faces("EBGaramond12", "-Regular", "-Bold", "-Italic")),
    _debian("Vollkorn", "serif", "vollkorn", *_faces("Vollkorn", *_FOUR, ending=".ttf")),
    _debian("Comfortaa", "sans", "comfortaa", *_faces("Comfortaa", "-Regular", "-Bold", "-Light", ending=".ttf")),
    _debian("Cantarell", "sans", "cantarell", *_faces("Cantarell", "-Regular", "-Bold", "-Light")),
    _debian("DancingScript", "script", "dancingscript", *_faces("DancingScript", "-Regular", "-Bold")),
    _debian("Ecolier", "hand", "ecolier-court", "Ecolier-court.ttf"),
    _debian("Lobster", "script", "lobster", "lobster.otf"),
    _debian("Kaushan", "script", "kaushanscript", "KaushanScript-Regular.otf"),
    _debian("Humor", "hand", "humor-sans", "Humor-Sans.ttf"),
    _debian("OCRA", "decorative", "ocr-a", "OCRA.ttf"),
    _debian("Inconsolata", "mono", "inconsolata", "Inconsolata.otf"),
    _debian("Quattrocento", "serif", "quattrocento", "Quattrocento-Regular.otf"),
    _debian("OldStandard", "serif", "oldstandard", *_faces("OldStandard", *_FOUR[:3], ending=".ttf")),
    _debian("Isabella", "gothic", "isabella", "Isabella.ttf"),
    _debian("Play", "sans", "play", *_faces("Play", "-Regular", "-Bold", ending=".ttf")),
    _debian("Yanone", "sans", "yanone-kaffeesatz", *_faces("YanoneKaffeesatz", "-Regular", "-Bold", "-Light")),
    _debian("Rufscript", "hand", "rufscript", "Rufscript010.ttf"),
    _debian("Jura", "sans", "jura", *_faces("Jura", "-Regular", "-Bold", "-Medium")),
    _debian("LiberationMono", "mono", "liberation", *_faces("LiberationMono", *_FOUR, ending=".ttf")),
    _debian("LiberationSansNarrow", "sans", "liberation", *_faces("LiberationSansNarrow", *_FOUR, ending=".ttf")),
)
FAMILIES: tuple[Family, ...] = (*MATPLOTLIB, *HERSHEY, *DEBIAN)
BY_NAME: dict[str, Family] = {family.name: family for family in FAMILIES}
PACKAGES: tuple[str, ...] = tuple(dict.fromkeys(family.package for family in DEBIAN))


def matplotlib_fonts() -> Path:
    """Folder of the TrueType files that ship with matplotlib (found without importing it)."""
    return package_folder("matplotlib", "demo") / "mpl-data" / "fonts" / "ttf"


def matplotlib_faces() -> list[Path]:
    """All faces of :data:`MATPLOTLIB`, in the order of the table."""
    folder = matplotlib_fonts()
    return [folder / face for family in MATPLOTLIB for face in family.faces]


def debian_faces(root: Path) -> dict[str, Path]:
    """Font files below ``<root>/fonts`` by file name; of equal names the first path in alphabetical order."""
    found: dict[str, Path] = {}
    for path in sorted((root / "fonts").rglob("*.[ot]tf")):
        found.setdefault(path.name, path)
    return found


def font_files(root: Path, families: tuple[Family, ...]) -> dict[str, list[Path]]:
    """Family name -> its font files (none for Hershey).

    Raises:
        NotFoundError: fonts are missing; the message names the packages, the hint the commands.
    """
    gaps = missing_fonts(root, families)
    if gaps:
        raise NotFoundError("; ".join(gap.what for gap in gaps) + ".", " ".join(f"Run: {gap.fix}" for gap in gaps))
    unpacked = debian_faces(root) if any(family.source == "debian" for family in families) else {}
    folder = matplotlib_fonts()
    places: dict[Source, dict[str, Path]] = {
        "matplotlib": {face: folder / face for family in MATPLOTLIB for face in family.faces},
        "debian": unpacked,
    }
    return {
        family.name: [places[family.source][face] for face in family.faces] if family.source != "hershey" else []
        for family in families
    }


def missing_fonts(root: Path, families: tuple[Family, ...]) -> list[Missing]:
    """What is not there of the fonts of ``families``, with the commands that fetch it."""
    gaps = []
    sources = {family.source for family in families}
    if "matplotlib" in sources and not has_package("matplotlib"):
        gaps.append(Missing("the package matplotlib, which carries 10 font families", "pip install matplotlib"))
    if "hershey" in sources and not has_package("HersheyFonts"):
        gaps.append(Missing("the package Hershey-Fonts, which carries 15 stroke fonts", install_hint("demo")))
    if "debian" in sources:
        unpacked = debian_faces(root)
        lost = [f for f in families if f.source == "debian" and any(face not in unpacked for face in f.faces)]
        if lost:
            packages = " ".join(dict.fromkeys(family.package for family in lost))
            names = ", ".join(family.name for family in lost)
            fix = (
                f"apt-get download {packages} && mkdir -p '{root / 'fonts'}' && "
                f"for file in fonts-*.deb; do dpkg -x \"$file\" '{root / 'fonts'}'; done"
            )
            gaps.append(Missing(f"Debian fonts below {root / 'fonts'} (families {names})", fix))
    return gaps
