"""What a user does on the page, whether a server or a worker runs the model."""

from playwright.sync_api import Page, expect


def fill(page: Page, **settings) -> None:
    """Set fields, those that are folded away, too."""
    page.evaluate(
        "(values) => { for (const id in values) document.getElementById(id).value = values[id]; }",
        settings,
    )


def settle(page: Page) -> None:
    """Wait until nothing is generated and all is drawn."""
    expect(page.locator("#surface")).to_have_attribute("aria-busy", "false")


def generate(page: Page, prompt: str = "", count: int = 12, **settings) -> None:
    """Write a prompt, and continue it by the keyboard."""
    fill(page, max_tokens=count, **settings)
    page.locator("#prompt").fill(prompt)
    page.keyboard.press("Control+Enter")
    settle(page)


def text(page: Page, which: str = "#columns .paper >> nth=0") -> str:
    """What stands on the page, without the mark at its end."""
    return page.locator(which).text_content().replace("\u200b", "")


def make_fork(page: Page) -> None:
    """Fork, and wait for the fork."""
    items = page.get_by_role("treeitem")
    count = items.count()
    page.get_by_role("button", name="Fork").click()
    expect(items).to_have_count(count + 1)
    expect(page.locator("#prompt")).to_be_focused()
    settle(page)
