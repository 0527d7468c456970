// Makes DOM elements, and connects them to nodes.

import { app } from "../../../scripts/app.js";

/** An element with properties, a `style` object and children. Strings become text, never HTML. */
export function el(tag, props = {}, ...children) {
    const { style, ...rest } = props;
    const made = Object.assign(document.createElement(tag), rest);
    Object.assign(made.style, style);
    made.append(...children);
    return made;
}

/** Replace an element's children if the data that they show has changed. */
export function fill(element, shown, make) {
    const key = JSON.stringify(shown);
    if (element.klShown === key) return;
    element.klShown = key;
    element.replaceChildren(...make());
}

export function addStyle({ href }) {
    if (!document.querySelector(`link[href="${href}"]`)) document.head.append(el("link", { rel: "stylesheet", href }));
}

/** The classic renderer lays elements over its canvas and expects these events back. */
export function forwardPanAndZoom(element) {
    const forward = (method) => (event) => {
        if (event.button === 1 || event.buttons & 4 || event.type === "wheel") app.canvas[method](event);
    };
    element.addEventListener("pointerdown", forward("processMouseDown"));
    element.addEventListener("pointermove", forward("processMouseMove"));
    element.addEventListener("pointerup", forward("processMouseUp"));
    element.addEventListener("wheel", (event) => {
        if (event.target.closest(".kl-scroll")) return;
        event.preventDefault();
        forward("processMouseWheel")(event);
    });
}

/** Call `then` after a method, with the method's arguments. */
export function after(object, name, then) {
    const before = object[name];
    object[name] = function (...given) {
        const result = before?.apply(this, given);
        then(...given);
        return result;
    };
}
