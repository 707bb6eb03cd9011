// The page's state in the address's fragment, which browsers keep to themselves: base64url of JSON. What is read back may be
// anybody's, so only strings and booleans under expected names come through. Tokens are never part of it.

/** Characters of the longest fragment that is read. */
const FRAGMENT_MAX = 100_000;

export function encode(state) {
    const bytes = new TextEncoder().encode(JSON.stringify(state));
    const binary = Array.from(bytes, (byte) => String.fromCharCode(byte)).join("");
    return btoa(binary).replaceAll("+", "-").replaceAll("/", "_").replace(/=+$/, "");
}

/** The state in a fragment, in the form of `expected`; nothing if there is none or it makes no sense. */
export function decode(fragment, expected) {
    const coded = fragment.replace(/^#/, "");
    if (coded === "" || coded.length > FRAGMENT_MAX) return undefined;
    try {
        const binary = atob(coded.replaceAll("-", "+").replaceAll("_", "/"));
        const text = new TextDecoder("utf-8", { fatal: true }).decode(
            Uint8Array.from(binary, (character) => character.charCodeAt(0)),
        );
        return shaped(JSON.parse(text), expected);
    } catch {
        return undefined;
    }
}

/** `given` with nothing but what `expected` has, of the same kinds. */
function shaped(given, expected) {
    if (Array.isArray(expected)) return expected.map((one, at) => shaped(Array.isArray(given) ? given[at] : undefined, one));
    if (typeof expected === "object") {
        const own = typeof given === "object" && given !== null ? given : {};
        return Object.fromEntries(
            Object.entries(expected).map(([key, one]) => [key, shaped(Object.hasOwn(own, key) ? own[key] : undefined, one)]),
        );
    }
    return typeof given === typeof expected ? given : expected;
}
