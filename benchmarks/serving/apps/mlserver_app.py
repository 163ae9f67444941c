"""MLServer's runtime on the same session. Its HTTP door reads JSON only, so tensors travel as Base64."""

from mlserver import MLModel
from mlserver.types import InferenceResponse, ResponseOutput
from onnx_models import open_model


class OnnxRuntime(MLModel):
    """Named by ``model-settings.json``."""

    async def load(self):
        """Open the ONNX file."""
        extra = self.settings.parameters.extra
        self._model = open_model(self.settings.parameters.uri, extra["shape"])
        return True

    async def predict(self, payload):
        """Answer the rows of one request, or of several that MLServer merged."""
        answers = self._model.run_text(list(payload.inputs[0].data))
        output = ResponseOutput(name="y", shape=[len(answers)], datatype="BYTES", data=answers)
        return InferenceResponse(model_name=self.name, id=payload.id, outputs=[output])
