// Light or dark: as the system has it, unless told otherwise.

const THEMES = { auto: "◐ auto", light: "○ light", dark: "● dark" };
const KEY = "lacuna.theme";

export function startTheme(button) {
    const names = Object.keys(THEMES);
    const use = (theme) => {
        document.documentElement.dataset.theme = theme;
        button.textContent = THEMES[theme];
        button.setAttribute("aria-label", `Theme: ${theme}`);
    };
    const kept = localStorage.getItem(KEY);
    use(names.includes(kept) ? kept : "auto");
    button.addEventListener("click", () => {
        const theme = names[(names.indexOf(document.documentElement.dataset.theme) + 1) % names.length];
        localStorage.setItem(KEY, theme);
        use(theme);
    });
}
