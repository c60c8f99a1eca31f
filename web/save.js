// The editor fills in %date:yyyy-MM-dd% and %Node.field% in the file names of the host's own save nodes only.
import { app } from "../../scripts/app.js";

app.registerExtension({
  name: "ZImageTurbo.SaveImage",
  nodeCreated(node) {
    if (node.comfyClass !== "ZImageTurboSaveImage") return;
    const prefix = node.widgets.find((widget) => widget.name === "filename_prefix");
    prefix.serializeValue = () => window.comfyAPI.utils.applyTextReplacements(app.graph, prefix.value);
  },
});
