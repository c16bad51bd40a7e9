/* The tables' colours follow the page's. */
var dagfuncs = (window.dashAgGridFunctions = window.dashAgGridFunctions || {});
dagfuncs.themeOfPage = (quartz) =>
  quartz
    .withParams({ backgroundColor: "#ffffff", foregroundColor: "#23272e", headerBackgroundColor: "#f4f5f6", browserColorScheme: "light", fontSize: 13, spacing: 5, fontFamily: "inherit" }, "light")
    .withParams({ backgroundColor: "#22262c", foregroundColor: "#e4e6ea", headerBackgroundColor: "#2b3037", browserColorScheme: "dark", fontSize: 13, spacing: 5, fontFamily: "inherit" }, "dark");
