/* The lab: a field that is being left sets the place first; then the button counts. */
window.dash_clientside = window.dash_clientside || {};
window.dash_clientside.moescope_lab = {
  go: (clicks) =>
    clicks ? new Promise((done) => window.setTimeout(() => done({ at: Date.now() }), 450)) : window.dash_clientside.no_update,
};
