"""Pages of which a section is rendered."""


def filled(page: str, name: str, section: str) -> str:
    """The page with the section of that name replaced."""
    start, end = f"<!-- {name}: rendered by make docs -->", f"<!-- end of {name} -->"
    before, _, rest = page.partition(start)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"The page has no section {name!r} to fill.")
    return f"{before}{start}\n\n{section}\n\n{end}{after}"
